//! Hand-made guests of a few instructions, and the ELF files around them.
//!
//! The code is loaded at 1 MiB and does not depend on where it is. 64-bit guests are entered as a Linux kernel is; 32-bit
//! guests by PVH, in protected mode without paging, so they reach devices at their physical addresses.

use std::arch::global_asm;

/// Where the code is loaded.
pub const BASE: u32 = 0x10_0000;

/// A guest: its code, and whether it is entered by PVH.
#[derive(Clone, Copy)]
pub struct Guest {
    code: &'static [u8],
    pvh: bool,
}

impl Guest {
    /// An ELF file that loads and enters the code.
    pub fn elf(self) -> Vec<u8> {
        self.elf_of(0)
    }

    /// The same with at least `size` bytes in the segment, which then begins at a page of the file.
    pub fn elf_of(self, size: usize) -> Vec<u8> {
        let notes = if self.pvh {
            let value = u64::from(BASE).to_le_bytes();
            [[4u32, 8, 18].map(u32::to_le_bytes).concat().as_slice(), b"Xen\0", &value].concat()
        } else {
            vec![]
        };
        let notes_at = 64 + 2 * 56;
        let code_at = if size == 0 { notes_at + notes.len() as u64 } else { 0x1000 };
        let half = |value: u16| value.to_le_bytes();
        let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        file.extend([half(2), half(62)].concat());
        file.extend(1u32.to_le_bytes());
        file.extend([u64::from(BASE), 64, 0].map(u64::to_le_bytes).concat());
        file.extend([0; 4]);
        file.extend([64, 56, 2, 0, 0, 0].map(half).concat());
        let code = self.code.len().max(size) as u64;
        for (kind, at, address, size, memory) in
            [(1u32, code_at, u64::from(BASE), code, code + 0x1000), (4, notes_at, 0, notes.len() as u64, 0)]
        {
            file.extend(kind.to_le_bytes());
            file.extend(7u32.to_le_bytes());
            file.extend([at, address, address, size, memory, 4].map(u64::to_le_bytes).concat());
        }
        file.extend(notes);
        file.resize(code_at as usize, 0);
        file.extend(self.code);
        file.resize((code_at + code) as usize, 0xCC);
        file
    }
}

/// Defines a guest between two labels.
macro_rules! guest {
    ($name:ident, $start:ident, $end:ident, pvh: $pvh:expr, $($line:expr),+ $(,)?) => {
        global_asm!(
            ".pushsection .rodata.guests, \"a\", @progbits",
            concat!(".globl ", stringify!($start)),
            concat!(".globl ", stringify!($end)),
            concat!(stringify!($start), ":"),
            $($line,)+
            ".code64",
            concat!(stringify!($end), ":"),
            ".popsection",
        );
        /// See the code.
        pub fn $name() -> Guest {
            unsafe extern "C" {
                static $start: u8;
                static $end: u8;
            }
            let (start, end) = (&raw const $start, &raw const $end);
            // SAFETY: both labels are in the section above, with nothing but the guest's code between them.
            let code = unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) };
            Guest { code, pvh: $pvh }
        }
    };
}

// 64-bit entry: the command line that the zero page refers to, then power off by the sleep control register.
guest!(
    prints_its_command_line, prints_start, prints_end, pvh: false,
    ".code64",
    "mov ebx, [rsi + 0x228]",
    "mov dx, 0x3f8",
    "2: mov al, [rbx]",
    "test al, al",
    "jz 3f",
    "out dx, al",
    "inc rbx",
    "jmp 2b",
    "3: mov dx, 0x600",
    "mov al, 0x34",
    "out dx, al",
    "4: hlt",
    "jmp 4b",
);

// PVH entry: says P when the start information has its magic, then power off.
guest!(
    entered_by_pvh, pvh_start, pvh_end, pvh: true,
    ".code32",
    "cmp dword ptr [ebx], 0x336ec578",
    "jne 3f",
    "mov dx, 0x3f8",
    "mov al, 0x50",
    "out dx, al",
    "3: mov dx, 0x600",
    "mov al, 0x34",
    "out dx, al",
    "4: hlt",
    "jmp 4b",
);

// Reset by the chipset's register.
guest!(
    resets_by_chipset, chipset_start, chipset_end, pvh: true,
    ".code32",
    "mov dx, 0xcf9",
    "mov al, 6",
    "out dx, al",
    "4: hlt",
    "jmp 4b",
);

// Reset by the keyboard controller.
guest!(
    resets_by_keyboard, keyboard_start, keyboard_end, pvh: true,
    ".code32",
    "mov al, 0xfe",
    "out 0x64, al",
    "4: hlt",
    "jmp 4b",
);

// Writes to the boot timer, prints T, waits for ever.
guest!(
    writes_the_boot_timer, timer_start, timer_end, pvh: true,
    ".code32",
    "mov edi, 0xc0000000",
    "mov byte ptr [edi], 123",
    "mov dx, 0x3f8",
    "mov al, 0x54",
    "out dx, al",
    "4: hlt",
    "jmp 4b",
);

// An exception without a table of handlers.
guest!(
    triple_faults, fault_start, fault_end, pvh: true,
    ".code32",
    "ud2",
);

// Prints dots without end.
guest!(
    prints_for_ever, dots_start, dots_end, pvh: true,
    ".code32",
    "2: mov dx, 0x3fd",
    "in al, dx",
    "test al, 0x20",
    "jz 2b",
    "mov dx, 0x3f8",
    "mov al, 0x2e",
    "out dx, al",
    "jmp 2b",
);

// Prints what is typed; q powers off.
guest!(
    echoes, echo_start, echo_end, pvh: true,
    ".code32",
    "mov dx, 0x3f8",
    "mov al, 0x3e",
    "out dx, al",
    "2: mov dx, 0x3fd",
    "in al, dx",
    "test al, 1",
    "jz 2b",
    "mov dx, 0x3f8",
    "in al, dx",
    "out dx, al",
    "cmp al, 0x71",
    "jne 2b",
    "mov dx, 0x600",
    "mov al, 0x34",
    "out dx, al",
    "4: hlt",
    "jmp 4b",
);

// Starts all other processors by INIT and SIPI; each prints p once. When as many as the first character of the command line
// says have done so, prints B and powers off.
guest!(
    starts_all_processors, smp_start, smp_end, pvh: false,
    ".code64",
    "mov ebx, [rsi + 0x228]",
    "movzx ebx, byte ptr [rbx]",
    "sub ebx, 0x30",
    // The trampoline goes to 0x8000, its counter is at 0x8800.
    "lea rsi, [rip + 5f]",
    "mov edi, 0x8000",
    "mov ecx, 64",
    "rep movsb",
    // Local APIC in x2APIC mode.
    "mov ecx, 0x1b",
    "rdmsr",
    "or eax, 0xc00",
    "wrmsr",
    "mov ecx, 0x80f",
    "mov eax, 0x1ff",
    "xor edx, edx",
    "wrmsr",
    // INIT, then SIPI with vector 8, to all but self.
    "mov ecx, 0x830",
    "mov eax, 0xc4500",
    "wrmsr",
    "mov eax, 0xc4608",
    "wrmsr",
    "2: pause",
    "cmp word ptr [0x8800], bx",
    "jb 2b",
    "mov dx, 0x3f8",
    "mov al, 0x42",
    "out dx, al",
    "mov dx, 0x600",
    "mov al, 0x34",
    "out dx, al",
    "4: hlt",
    "jmp 4b",
    "5:",
    ".code16",
    "xor ax, ax",
    "mov ds, ax",
    "mov dx, 0x3f8",
    "mov al, 0x70",
    "out dx, al",
    "lock inc word ptr [0x8800]",
    "6: hlt",
    "jmp 6b",
);

// A driver for the entropy device: finds it as device 1 of bus 0, gets 16 bytes with an MSI-X interrupt, resets it.
guest!(
    drives_the_entropy_device, rng_start, rng_end, pvh: true,
    ".code32",
    "mov esp, 0x300000",
    // Vendor 1af4, device 1044; else print X.
    "mov esi, 0xe0008000",
    "cmp dword ptr [esi], 0x10441af4",
    "jne 9f",
    // The size of BAR 0 is 32 KiB; then it is put back and decoded, and the device masters the bus.
    "mov edi, [esi + 0x10]",
    "and edi, 0xfffffff0",
    "mov dword ptr [esi + 0x10], 0xffffffff",
    "mov eax, [esi + 0x10]",
    "and eax, 0xfffffff0",
    "cmp eax, 0xffff8000",
    "jne 9f",
    "mov [esi + 0x10], edi",
    "mov word ptr [esi + 4], 6",
    // The list of capabilities, up to MSI-X.
    "movzx eax, byte ptr [esi + 0x34]",
    "2: cmp byte ptr [esi + eax], 0x11",
    "je 3f",
    "movzx eax, byte ptr [esi + eax + 1]",
    "test eax, eax",
    "jz 9f",
    "jmp 2b",
    // Vector 1 is interrupt 0x40 of processor 0.
    "3: mov dword ptr [edi + 0x4010], 0xfee00000",
    "mov dword ptr [edi + 0x4014], 0",
    "mov dword ptr [edi + 0x4018], 0x40",
    "mov dword ptr [edi + 0x401c], 0",
    "mov word ptr [esi + eax + 2], 0x8000",
    // Its gate, at 0x200200 in a table at 0x200000; code segment 0x10.
    "call 4f",
    // The interrupt, whose address the call leaves on the stack: the buffer is used, with 16 bytes that are not all zero.
    "mov dword ptr [0xfee000b0], 0",
    "cmp word ptr [0x212002], 1",
    "jne 9f",
    "cmp dword ptr [0x212008], 16",
    "jne 9f",
    "mov eax, [0x213000]",
    "or eax, [0x213004]",
    "or eax, [0x213008]",
    "or eax, [0x21300c]",
    "jz 9f",
    // Reset, and wait for its end.
    "mov byte ptr [edi + 0x14], 0",
    "6: cmp byte ptr [edi + 0x14], 0",
    "jne 6b",
    "cmp word ptr [edi + 0x1c], 0",
    "jne 9f",
    "mov al, 0x52",
    "mov dx, 0x3f8",
    "out dx, al",
    "mov dx, 0x600",
    "mov al, 0x34",
    "out dx, al",
    "7: hlt",
    "jmp 7b",
    "4: pop eax",
    "mov word ptr [0x200200], ax",
    "mov word ptr [0x200202], 0x10",
    "mov word ptr [0x200204], 0x8e00",
    "shr eax, 16",
    "mov word ptr [0x200206], ax",
    "mov word ptr [0x201000], 0x3ff",
    "mov dword ptr [0x201002], 0x200000",
    "lidt [0x201000]",
    "mov dword ptr [0xfee000f0], 0x1ff",
    "sti",
    // Virtio: acknowledge, driver, features: version 1 only.
    "mov byte ptr [edi + 0x14], 0",
    "mov byte ptr [edi + 0x14], 1",
    "mov byte ptr [edi + 0x14], 3",
    "mov dword ptr [edi + 8], 1",
    "mov dword ptr [edi + 12], 1",
    "mov byte ptr [edi + 0x14], 11",
    "test byte ptr [edi + 0x14], 8",
    "jz 9f",
    // Queue 0 of 8 entries with vector 1: descriptors 0x210000, available 0x211000, used 0x212000.
    "mov word ptr [edi + 0x16], 0",
    "mov word ptr [edi + 0x18], 8",
    "mov word ptr [edi + 0x1a], 1",
    "cmp word ptr [edi + 0x1a], 1",
    "jne 9f",
    "mov dword ptr [edi + 0x20], 0x210000",
    "mov dword ptr [edi + 0x28], 0x211000",
    "mov dword ptr [edi + 0x30], 0x212000",
    "mov word ptr [edi + 0x1c], 1",
    "mov byte ptr [edi + 0x14], 15",
    // One buffer of 16 bytes for the device to write, at 0x213000.
    "mov dword ptr [0x210000], 0x213000",
    "mov dword ptr [0x210004], 0",
    "mov dword ptr [0x210008], 16",
    "mov dword ptr [0x21000c], 2",
    "mov word ptr [0x211004], 0",
    "mov word ptr [0x211002], 1",
    "mov word ptr [edi + 0x3000], 0",
    "5: hlt",
    "jmp 5b",
    // Something is not as it should be.
    "9: mov al, 0x58",
    "mov dx, 0x3f8",
    "out dx, al",
    "mov dx, 0x600",
    "mov al, 0x34",
    "out dx, al",
    "jmp 5b",
);

// Prints the letters from A to Z again and again. With each it counts in one of 64 pages, and looks whether that page has what
// it left there; if not it prints an exclamation mark and waits for ever.
guest!(
    prints_letters, letters_start, letters_end, pvh: true,
    ".code32",
    "xor ebp, ebp",
    "2: mov edi, ebp",
    "and edi, 63",
    "shl edi, 12",
    "add edi, 0x400000",
    "mov eax, ebp",
    "shr eax, 6",
    "cmp [edi], eax",
    "jne 5f",
    "inc eax",
    "mov [edi], eax",
    "mov eax, ebp",
    "xor edx, edx",
    "mov ecx, 26",
    "div ecx",
    "lea ebx, [edx + 0x41]",
    "3: mov dx, 0x3fd",
    "in al, dx",
    "test al, 0x20",
    "jz 3b",
    "mov dx, 0x3f8",
    "mov al, bl",
    "out dx, al",
    "inc ebp",
    "mov ecx, 300",
    "4: dec ecx",
    "jnz 4b",
    "jmp 2b",
    "5: mov dx, 0x3f8",
    "mov al, 0x21",
    "out dx, al",
    "6: hlt",
    "jmp 6b",
);

// Has its clock (MSR_KVM_SYSTEM_TIME_NEW) and the time of its start (MSR_KVM_WALL_CLOCK_NEW) in memory, as Linux has, and prints
// letters.
guest!(
    has_a_clock, clock_start, clock_end, pvh: true,
    ".code32",
    "xor edx, edx",
    "mov ecx, 0x4b564d00",
    "mov eax, 0x501000",
    "wrmsr",
    "mov ecx, 0x4b564d01",
    "mov eax, 0x500001",
    "wrmsr",
    "xor ebp, ebp",
    "2: mov eax, ebp",
    "xor edx, edx",
    "mov ecx, 26",
    "div ecx",
    "lea ebx, [edx + 0x41]",
    "3: mov dx, 0x3fd",
    "in al, dx",
    "test al, 0x20",
    "jz 3b",
    "mov dx, 0x3f8",
    "mov al, bl",
    "out dx, al",
    "inc ebp",
    "mov ecx, 300",
    "4: dec ecx",
    "jnz 4b",
    "jmp 2b",
);

// Prints the lower half of IA32_ARCH_CAPABILITIES: a letter from a to p per four bits, the highest first.
guest!(
    prints_capabilities, capabilities_start, capabilities_end, pvh: true,
    ".code32",
    "mov ecx, 0x10a",
    "rdmsr",
    "mov ebp, eax",
    "mov ecx, 8",
    "mov dx, 0x3f8",
    "2: rol ebp, 4",
    "mov eax, ebp",
    "and eax, 15",
    "add eax, 0x61",
    "out dx, al",
    "dec ecx",
    "jnz 2b",
    "mov dx, 0x600",
    "mov al, 0x34",
    "out dx, al",
    "4: hlt",
    "jmp 4b",
);

// Prints a letter with each tick of the local APIC's periodic timer.
guest!(
    ticks, ticks_start, ticks_end, pvh: true,
    ".code32",
    "mov esp, 0x300000",
    "call 3f",
    // The interrupt, whose address the call leaves on the stack.
    "mov dword ptr [0xfee000b0], 0",
    "mov dx, 0x3f8",
    "mov al, 0x74",
    "out dx, al",
    // No return: a software flavour of KVM may not know how.
    "mov esp, 0x300000",
    "sti",
    "5: hlt",
    "jmp 5b",
    // Its gate: interrupt 0x40, in a table at 0x200000; code segment 0x10.
    "3: pop eax",
    "mov word ptr [0x200200], ax",
    "mov word ptr [0x200202], 0x10",
    "mov word ptr [0x200204], 0x8e00",
    "shr eax, 16",
    "mov word ptr [0x200206], ax",
    "mov word ptr [0x201000], 0x3ff",
    "mov dword ptr [0x201002], 0x200000",
    "lidt [0x201000]",
    // Local APIC on, its timer periodic with 20 million steps of the bus clock.
    "mov dword ptr [0xfee000f0], 0x1ff",
    "mov dword ptr [0xfee003e0], 0xb",
    "mov dword ptr [0xfee00320], 0x20040",
    "mov dword ptr [0xfee00380], 20000000",
    "sti",
    "4: hlt",
    "jmp 4b",
);

/// The beginning of a driver that waits without interrupts: device 1 of bus 0 has to have this vendor and device. Its queue
/// 0 gets 8 entries: descriptors 0x210000, available 0x211000, used 0x212000. edi is its BAR. X and power off at label 9.
macro_rules! begins_to_drive {
    ($identity:literal) => {
        concat!(
            "mov esp, 0x300000\n",
            "mov esi, 0xe0008000\n",
            "cmp dword ptr [esi], ",
            $identity,
            "\njne 9f\n",
            "mov edi, [esi + 0x10]\n",
            "and edi, 0xfffffff0\n",
            "mov word ptr [esi + 4], 6\n",
            "mov byte ptr [edi + 0x14], 0\n",
            "mov byte ptr [edi + 0x14], 1\n",
            "mov byte ptr [edi + 0x14], 3\n",
            "mov dword ptr [edi + 8], 1\n",
            "mov dword ptr [edi + 12], 1\n",
            "mov byte ptr [edi + 0x14], 11\n",
            "mov word ptr [edi + 0x16], 0\n",
            "mov word ptr [edi + 0x18], 8\n",
            "mov dword ptr [edi + 0x20], 0x210000\n",
            "mov dword ptr [edi + 0x28], 0x211000\n",
            "mov dword ptr [edi + 0x30], 0x212000\n",
            "mov word ptr [edi + 0x1c], 1\n",
            "mov byte ptr [edi + 0x14], 15\n",
        )
    };
}

/// The end of such a driver: prints al and powers off; at label 9 with X.
macro_rules! ends_with_al {
    () => {
        concat!(
            "8: mov dx, 0x3f8\n",
            "out dx, al\n",
            "mov dx, 0x600\n",
            "mov al, 0x34\n",
            "out dx, al\n",
            "7: hlt\n",
            "jmp 7b\n",
            "9: mov al, 0x58\n",
            "jmp 8b\n",
        )
    };
}

// A driver for a disk: reads sector 0 and prints its first byte for each character that is typed. At q it writes a sector
// that begins with W to sector 1, prints D and powers off.
guest!(
    drives_a_disk, disk_start, disk_end, pvh: true,
    ".code32",
    begins_to_drive!("0x10421af4"),
    // Header at 0x213000, data at 0x214000, status at 0x215000.
    "mov dword ptr [0x210000], 0x213000",
    "mov dword ptr [0x210008], 16",
    "mov dword ptr [0x21000c], 0x10001",
    "mov dword ptr [0x210010], 0x214000",
    "mov dword ptr [0x210018], 512",
    "mov dword ptr [0x21001c], 0x20003",
    "mov dword ptr [0x210020], 0x215000",
    "mov dword ptr [0x210028], 1",
    "mov dword ptr [0x21002c], 2",
    "xor ebx, ebx",
    "2: mov dx, 0x3fd",
    "3: in al, dx",
    "test al, 1",
    "jz 3b",
    "mov dx, 0x3f8",
    "in al, dx",
    "cmp al, 0x71",
    "je 5f",
    "call 6f",
    "mov al, [0x214000]",
    "mov dx, 0x3f8",
    "out dx, al",
    "jmp 2b",
    "5: mov dword ptr [0x213000], 1",
    "mov dword ptr [0x213008], 1",
    "mov byte ptr [0x214000], 0x57",
    "mov dword ptr [0x21001c], 0x20001",
    "call 6f",
    "mov al, 0x44",
    ends_with_al!(),
    // One request from beginning to end. Entries of the available ring are all 0.
    "6: mov byte ptr [0x215000], 0xff",
    "inc ebx",
    "mov word ptr [0x211002], bx",
    "mov word ptr [edi + 0x3000], 0",
    "4: cmp word ptr [0x212002], bx",
    "jne 4b",
    "cmp byte ptr [0x215000], 0",
    "jne 9b",
    "ret",
);

// A driver for a balloon: gives up the page at 4 MiB, where it wrote something, and finds it empty then; prints B.
guest!(
    drives_a_balloon, balloon_start, balloon_end, pvh: true,
    ".code32",
    begins_to_drive!("0x10451af4"),
    "mov dword ptr [0x400000], 0x55",
    "mov dword ptr [0x213000], 0x400",
    "mov dword ptr [0x210000], 0x213000",
    "mov dword ptr [0x210008], 4",
    "mov word ptr [0x211002], 1",
    "mov word ptr [edi + 0x3000], 0",
    "4: cmp word ptr [0x212002], 1",
    "jne 4b",
    "cmp dword ptr [0x400000], 0",
    "jne 9f",
    // Its size is the driver's to tell.
    "mov dword ptr [edi + 0x2004], 1",
    "cmp dword ptr [edi + 0x2004], 1",
    "jne 9f",
    "mov al, 0x42",
    ends_with_al!(),
);

// A driver for persistent memory, which has to lie at 4 GiB: flushes it and prints F.
guest!(
    flushes_persistent_memory, flush_start, flush_end, pvh: true,
    ".code32",
    begins_to_drive!("0x105b1af4"),
    "cmp dword ptr [edi + 0x2000], 0",
    "jne 9f",
    "cmp dword ptr [edi + 0x2004], 1",
    "jne 9f",
    "mov dword ptr [0x213008], 0xff",
    "mov dword ptr [0x210000], 0x213000",
    "mov dword ptr [0x210008], 4",
    "mov dword ptr [0x21000c], 0x10001",
    "mov dword ptr [0x210010], 0x213008",
    "mov dword ptr [0x210018], 4",
    "mov dword ptr [0x21001c], 2",
    "mov word ptr [0x211002], 1",
    "mov word ptr [edi + 0x3000], 0",
    "4: cmp word ptr [0x212002], 1",
    "jne 4b",
    "cmp dword ptr [0x213008], 0",
    "jne 9f",
    "mov al, 0x46",
    ends_with_al!(),
);

// Prints the first byte of the persistent memory at 4 GiB, writes W to it, prints it again, powers off.
guest!(
    writes_persistent_memory, pmem_start, pmem_end, pvh: false,
    ".code64",
    // A page directory for the fifth GiB with one page of 2 MiB; the table of GiB is the one it was entered with.
    "mov rax, 0x100000083",
    "mov [0x200000], rax",
    "mov qword ptr [0xa020], 0x200003",
    "mov rbx, 0x100000000",
    "mov dx, 0x3f8",
    "mov al, [rbx]",
    "out dx, al",
    "mov byte ptr [rbx], 0x57",
    "mov al, [rbx]",
    "out dx, al",
    "mov dx, 0x600",
    "mov al, 0x34",
    "out dx, al",
    "4: hlt",
    "jmp 4b",
);
