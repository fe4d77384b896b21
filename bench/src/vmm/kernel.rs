//! A stock kernel up to its init: the same kernel, initramfs and command line for both programs. For machines, or the rig, whose
//! `/dev/kvm` runs Linux.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;

use super::program::{Devices, Running, Shape};
use super::{Contest, VmmError, ms};
use crate::compare::{Better, Comparison};

/// What to boot, how often.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    contest: Contest,
    /// The kernel: a bzImage or an ELF vmlinux.
    #[arg(long)]
    kernel: PathBuf,
    /// Its command line.
    #[arg(long, default_value = "console=ttyS0 quiet reboot=k panic=-1")]
    cmdline: String,
    /// Memory in MiB.
    #[arg(long, default_value_t = 256)]
    memory: u32,
    /// Boots of each program; one more warms caches.
    #[arg(long, default_value_t = 5)]
    runs: u32,
}

/// What init prints.
const SAYS: &str = "INIT";

/// Init: `write(1, "INIT\n", 5); reboot(…, RESTART)`.
#[rustfmt::skip]
const CODE: &[u8] = &[
    0xB8, 1, 0, 0, 0,                // mov eax, 1 (write)
    0xBF, 1, 0, 0, 0,                // mov edi, 1
    0x48, 0x8D, 0x35, 34, 0, 0, 0,   // lea rsi, [text]
    0xBA, 5, 0, 0, 0,                // mov edx, 5
    0x0F, 0x05,                      // syscall
    0xB8, 169, 0, 0, 0,              // mov eax, 169 (reboot)
    0xBF, 0xAD, 0xDE, 0xE1, 0xFE,    // mov edi, LINUX_REBOOT_MAGIC1
    0xBE, 0x69, 0x19, 0x12, 0x28,    // mov esi, LINUX_REBOOT_MAGIC2
    0xBA, 0x67, 0x45, 0x23, 0x01,    // mov edx, LINUX_REBOOT_CMD_RESTART
    0x45, 0x31, 0xD2,                // xor r10d, r10d
    0x0F, 0x05,                      // syscall
    0xEB, 0xFE,                      // jmp .
    b'I', b'N', b'I', b'T', b'\n',
];

/// Init as a static ELF program at 4 MiB.
fn init() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let half = |value: u16| value.to_le_bytes();
    let size = HEADERS.saturating_add(u64::try_from(CODE.len()).unwrap_or(0));
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend([half(2), half(62)].concat());
    file.extend(1u32.to_le_bytes());
    file.extend([BASE + HEADERS, 64, 0].map(u64::to_le_bytes).concat());
    file.extend([0; 4]);
    file.extend([64, 56, 1, 0, 0, 0].map(half).concat());
    file.extend([1u32, 5].map(u32::to_le_bytes).concat());
    file.extend([0, BASE, BASE, size, size, 4096].map(u64::to_le_bytes).concat());
    [file, CODE.to_vec()].concat()
}

/// A newc cpio archive with a console and init.
fn initramfs() -> Vec<u8> {
    let mut all = vec![];
    let mut add = |name: &str, mode: u32, device: [u32; 2], content: &[u8]| {
        let length = |n: usize| u32::try_from(n).unwrap_or(0);
        let [major, minor] = device;
        let fields =
            [0, mode, 0, 0, 1, 0, length(content.len()), 0, 0, major, minor, length(name.len() + 1), 0];
        all.extend_from_slice(b"070701");
        fields.iter().for_each(|field| all.extend_from_slice(format!("{field:08x}").as_bytes()));
        all.extend_from_slice(name.as_bytes());
        all.push(0);
        all.resize(all.len().next_multiple_of(4), 0);
        all.extend_from_slice(content);
        all.resize(all.len().next_multiple_of(4), 0);
    };
    add("dev", 0o040_755, [0, 0], &[]);
    add("dev/console", 0o020_600, [5, 1], &[]);
    add("init", 0o100_755, [0, 0], &init());
    add("TRAILER!!!", 0, [0, 0], &[]);
    all
}

/// Boots both, alternating.
///
/// # Errors
/// A program cannot be started or its kernel does not reach init.
pub fn run(options: &Options, out: &Path) -> Result<Comparison, VmmError> {
    let folder = out.join("vmm-guests");
    fs::create_dir_all(&folder).map_err(|e| VmmError::file(&folder, e))?;
    let archive = folder.join("initramfs.cpio");
    fs::write(&archive, initramfs()).map_err(|e| VmmError::file(&archive, e))?;
    let shape = Shape {
        kernel: options.kernel.clone(),
        initramfs: Some(archive),
        cmdline: options.cmdline.clone(),
        memory_mib: options.memory,
        fork_ready: false,
        devices: Devices::default(),
    };
    let programs = options.contest.programs();
    let mut table =
        Comparison::new("kernel: a stock kernel up to its init, 1 vCPU", options.contest.has_peer());
    for round in 0..=options.runs {
        for (column, program) in programs.iter().enumerate() {
            let mut vm = Running::start(program.command(&shape, &folder)?)?;
            let init = vm.hears(SAYS)?;
            let life = vm.ends()?;
            if round > 0 {
                let mut add = |row, value| table.add(row, "ms", Better::Less(0.8), column, value);
                add("process start → init", ms(init));
                add("whole life: start, init, reboot, exit", ms(life));
            }
        }
    }
    Ok(table)
}
