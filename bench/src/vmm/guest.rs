//! The small guests of the benchmark, as ELF files that any VMM can load: with a PVH note (32-bit protected mode, paging off).
//!
//! They need nothing but port 0x3F8, the page of the boot timer and the reset of a keyboard controller, so they also run where
//! KVM is software and interprets the guest's kernel mode. The code is machine code by hand; the assembly is beside it.

/// Where the code is loaded.
const BASE: u32 = 0x10_0000;

/// What a guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    /// Prints `A`, gives the boot signal, prints `B`, resets.
    Resets,
    /// Prints `A`, gives the boot signal, prints `B`, waits for ever.
    Idles,
    /// Writes to 4096 pages (16 MiB), prints `B`, waits for ever.
    DirtiesAndIdles,
    /// Prints `B`, then dots without end, about a thousand instructions apart.
    Prints,
}

/// `mov dx, 0x3f8; mov al, 'A'; out dx, al; mov edi, 0xc0000000; mov byte [edi], 123; mov al, 'B'; out dx, al`
#[rustfmt::skip]
const SIGNALS: &[u8] = &[
    0x66, 0xBA, 0xF8, 0x03, 0xB0, b'A', 0xEE, 0xBF, 0x00, 0x00, 0x00, 0xC0, 0xC6, 0x07, 123, 0xB0, b'B', 0xEE,
];
/// `mov al, 0xfe; out 0x64, al`
const RESET: &[u8] = &[0xB0, 0xFE, 0xE6, 0x64];
/// `hlt; jmp` back to it
const WAIT: &[u8] = &[0xF4, 0xEB, 0xFD];
/// `mov edi, 0x400000; mov ecx, 4096; l: mov [edi], edi; add edi, 4096; dec ecx; jnz l`
#[rustfmt::skip]
const DIRTIES: &[u8] = &[
    0xBF, 0x00, 0x00, 0x40, 0x00, 0xB9, 0x00, 0x10, 0x00, 0x00,
    0x89, 0x3F, 0x81, 0xC7, 0x00, 0x10, 0x00, 0x00, 0x49, 0x75, 0xF5,
];
/// `mov dx, 0x3f8; mov al, 'B'; out dx, al`
const PRINTS_B: &[u8] = &[0x66, 0xBA, 0xF8, 0x03, 0xB0, b'B', 0xEE];
/// `l: mov al, '.'; out dx, al; mov ecx, 500; m: dec ecx; jnz m; jmp l`
const DOTS: &[u8] = &[0xB0, b'.', 0xEE, 0xB9, 0xF4, 0x01, 0x00, 0x00, 0x49, 0x75, 0xFD, 0xEB, 0xF3];

impl Guest {
    fn code(self) -> Vec<u8> {
        match self {
            Self::Resets => [SIGNALS, RESET, WAIT].concat(),
            Self::Idles => [SIGNALS, WAIT].concat(),
            Self::DirtiesAndIdles => [DIRTIES, PRINTS_B, WAIT].concat(),
            Self::Prints => [PRINTS_B, DOTS].concat(),
        }
    }

    /// An ELF file that loads and enters the code.
    pub fn elf(self) -> Vec<u8> {
        let code = self.code();
        let base = u64::from(BASE);
        let note =
            [[4u32, 8, 18].map(u32::to_le_bytes).concat(), b"Xen\0".to_vec(), base.to_le_bytes().into()];
        let note = note.concat();
        let long = |bytes: &[u8]| u64::try_from(bytes.len()).unwrap_or(0);
        let (note_at, half) = (64 + 2 * 56, |value: u16| value.to_le_bytes());
        let code_at = note_at + long(&note);
        let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        file.extend([half(2), half(62)].concat());
        file.extend(1u32.to_le_bytes());
        file.extend([base, 64, 0].map(u64::to_le_bytes).concat());
        file.extend([0; 4]);
        file.extend([64, 56, 2, 0, 0, 0].map(half).concat());
        let (load, notes) = ((1u32, code_at, base, long(&code)), (4u32, note_at, 0, long(&note)));
        for (kind, at, address, size) in [load, notes] {
            file.extend(kind.to_le_bytes());
            file.extend(7u32.to_le_bytes());
            file.extend([at, address, address, size, size, 4].map(u64::to_le_bytes).concat());
        }
        [file, note, code].concat()
    }
}
