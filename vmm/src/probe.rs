//! Tries which guests this machine's `/dev/kvm` can run. It tries, because the device alone says little: software flavours
//! run small guests and fail at what a kernel needs.
//!
//! * small guests: a few instructions that write to a port;
//! * Linux guests: user code in long mode that does SYSCALL into the kernel, which comes back by SYSRET.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Mutex;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuExit;
use serde::Serialize;
use vm_memory::{Bytes, GuestAddress};

use crate::arch::x86_64::registers::{self, Entry};
use crate::kvm::Vm;
use crate::memory;

/// What this machine can run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "guests")]
pub enum Answer {
    /// None.
    NoKvm {
        /// Why.
        reason: String,
    },
    /// A few instructions, but no Linux kernel.
    SmallGuestsOnly {
        /// Why.
        reason: String,
    },
    /// Linux kernels.
    LinuxGuests,
}

impl std::fmt::Display for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NoKvm { reason } => write!(f, "no kvm ({reason})"),
            Self::SmallGuestsOnly { reason } => write!(f, "small guests only ({reason})"),
            Self::LinuxGuests => f.write_str("linux guests"),
        }
    }
}

const CODE: u64 = 0x10_0000;
const PORT: u16 = 0x10;
/// Longest that a probe guest may run, in seconds.
const LIMIT: i64 = 2;

/// `mov al, 42; out 0x10, al; hlt`
const SMALL: &[u8] = &[0xB0, 42, 0xE6, 0x10, 0xF4];

/// Enters ring 3 by SYSRET, comes back by SYSCALL, and says 42 only when it is in ring 0 then.
#[rustfmt::skip]
const SYSCALL: &[u8] = &[
    // 00: user code at 0x100040, flags in r11
    0x48, 0xC7, 0xC1, 0x40, 0x00, 0x10, 0x00,   // mov rcx, 0x100040
    0x49, 0xC7, 0xC3, 0x02, 0x00, 0x00, 0x00,   // mov r11, 2
    0x48, 0x0F, 0x07,                           // sysretq
    0xF4, 0xF4, 0xF4, 0xF4, 0xF4, 0xF4, 0xF4, 0xF4, 0xF4, 0xF4, 0xF4, 0xF4, 0xF4, 0xF4, 0xF4,
    // 20: where SYSCALL leads: reading CR0 needs ring 0
    0x0F, 0x20, 0xC0,                           // mov rax, cr0
    0xB0, 42,                                   // mov al, 42
    0xE6, 0x10,                                 // out 0x10, al
    0xF4,                                       // hlt
    0xF4, 0xF4, 0xF4, 0xF4, 0xF4, 0xF4, 0xF4, 0xF4,
    0xF4, 0xF4, 0xF4, 0xF4, 0xF4, 0xF4, 0xF4, 0xF4,
    0xF4, 0xF4, 0xF4, 0xF4, 0xF4, 0xF4, 0xF4, 0xF4,
    // 40: user code
    0x0F, 0x05,                                 // syscall
    0xF4,                                       // hlt: a fault in ring 3
];

/// Tries it.
pub fn probe() -> Answer {
    let kvm = match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(file) => file,
        Err(error) => return Answer::NoKvm { reason: format!("/dev/kvm: {error}") },
    };
    let again = kvm.try_clone();
    if let Err(reason) = try_guest(kvm.into(), SMALL, false) {
        return Answer::NoKvm { reason };
    }
    let second = again.map_err(|e| e.to_string()).and_then(|kvm| try_guest(kvm.into(), SYSCALL, true));
    match second {
        Ok(()) => Answer::LinuxGuests,
        Err(reason) => Answer::SmallGuestsOnly { reason: format!("a system call from user mode: {reason}") },
    }
}

/// Only one guest at a time: the time limit is one per process.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

extern "C" fn on_alarm(_: libc::c_int) {}

/// Ends a guest that does not end: a signal without restart makes `KVM_RUN` return.
fn set_limit(seconds: i64) -> io::Result<()> {
    // SAFETY: an all-zero sigaction is valid: no flags, empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(libc::c_int) = on_alarm;
    action.sa_sigaction = handler as libc::sighandler_t;
    // SAFETY: the structure is filled; the handler does nothing.
    if unsafe { libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // Repeated, in case the first signal comes between two entries into the guest.
    let time = libc::timeval { tv_sec: seconds, tv_usec: 0 };
    let timer = libc::itimerval { it_interval: time, it_value: time };
    // SAFETY: the pointer is to a filled structure.
    match unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn try_guest(kvm: OwnedFd, code: &[u8], user_mode: bool) -> Result<(), String> {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    set_limit(LIMIT).map_err(|e| e.to_string())?;
    let result = run_guest(kvm, code, user_mode);
    set_limit(0).map_err(|e| e.to_string())?;
    result
}

fn run_guest(kvm: OwnedFd, code: &[u8], user_mode: bool) -> Result<(), String> {
    let text = |error: &dyn std::error::Error| crate::chain(error);
    let vm = Vm::new(kvm).map_err(|e| text(&e))?;
    let memory = memory::create(16).map_err(|e| text(&e))?;
    vm.set_memory(&memory, false).map_err(|e| text(&e))?;
    let template = vm.cpuid(1).map_err(|e| text(&e))?;
    let mut vcpu = vm.create_vcpu(0).map_err(|e| text(&e))?;
    let entry = Entry::Linux64 { address: CODE };
    registers::write_tables(&memory, entry).map_err(|e| text(&e))?;
    memory.write_slice(code, GuestAddress(CODE)).map_err(|e| text(&e))?;
    let mut special = registers::special(entry);
    if user_mode {
        registers::open_to_user(&memory).map_err(|e| text(&e))?;
        // SCE beside LME and LMA.
        special.efer |= 1;
        let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
        // STAR: SYSCALL gets 0x10, SYSRET 0x30 and 0x28 with ring 3; LSTAR; FMASK.
        let msrs =
            [entry(0xC000_0081, 0x0020_0010 << 32), entry(0xC000_0082, CODE + 0x20), entry(0xC000_0084, 0)];
        let msrs = Msrs::from_entries(&msrs).map_err(|e| format!("{e:?}"))?;
        vcpu.set_sregs(&special).map_err(|e| text(&e))?;
        vcpu.set_msrs(&msrs).map_err(|e| text(&e))?;
    }
    let cpuid = template.for_vcpu(0).map_err(|e| format!("{e:?}"))?;
    vcpu.set_cpuid2(&cpuid).map_err(|e| text(&e))?;
    vcpu.set_sregs(&special).map_err(|e| text(&e))?;
    vcpu.set_regs(&registers::general(entry)).map_err(|e| text(&e))?;
    match vcpu.run() {
        Ok(VcpuExit::IoOut(PORT, [42])) => Ok(()),
        Ok(other) => Err(format!("the guest ended with {other:?}")),
        Err(error) if error.errno() == libc::EINTR => Err(format!("the guest did not end in {LIMIT} s")),
        Err(error) => Err(format!("KVM_RUN: {error}")),
    }
}
