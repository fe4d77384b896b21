//! What happens at a forbidden call: the kernel does not make it but sends SIGSYS, whose handler says which call it was and ends
//! the process.
//!
//! The handler runs in a thread that may be hijacked. It only tells; the call was refused before, and what else it does is
//! allowed to that thread anyway. The handler cannot be replaced: after set-up no filter allows `rt_sigaction`.

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::OnceLock;

use blixard_vmm_api::{ExitReason, VmId};

/// Where the exit record goes, and its text up to the number of the call.
static RECORD: OnceLock<(RawFd, String)> = OnceLock::new();

/// Text of an exit record around the number of the call.
const RECORD_TAIL: &[u8] = b"}}";

/// A piece of text without allocation.
struct Text {
    bytes: [u8; 96],
    length: usize,
}

impl Text {
    const fn new() -> Self {
        Self { bytes: [0; 96], length: 0 }
    }

    fn push(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(to) = self.bytes.get_mut(self.length) {
                *to = *byte;
                self.length += 1;
            }
        }
    }

    fn push_number(&mut self, number: u32) {
        let mut divisor = 1_000_000_000;
        let mut begun = false;
        while divisor > 0 {
            let digit = number / divisor % 10;
            begun |= digit != 0 || divisor == 1;
            if begun {
                self.push(&[b'0'.saturating_add(u8::try_from(digit).unwrap_or(0))]);
            }
            divisor /= 10;
        }
    }

    fn write_to(&self, fd: RawFd) {
        let bytes = self.bytes.get(..self.length).unwrap_or_default();
        // SAFETY: pointer and length are those of a slice.
        unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
    }
}

/// The beginning of `siginfo_t` for SIGSYS (include/uapi/asm-generic/siginfo.h).
#[repr(C)]
struct Info {
    signal: c_int,
    errno: c_int,
    code: c_int,
    call_address: usize,
    call: c_int,
}

extern "C" fn on_forbidden(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: for SIGSYS the kernel hands over a filled structure that begins this way and is 128 bytes long.
    let call = unsafe { (*info.cast::<Info>()).call };
    let mut number = Text::new();
    number.push_number(call.unsigned_abs());
    let mut line = Text::new();
    line.push(b"blixard-vmm: ended: it made the forbidden system call ");
    line.push(number.bytes.get(..number.length).unwrap_or_default());
    line.push(b"\n");
    line.write_to(libc::STDERR_FILENO);
    if let Some((fd, head)) = RECORD.get() {
        // SAFETY: pointer and length are those of a string.
        unsafe { libc::write(*fd, head.as_ptr().cast(), head.len()) };
        number.push(RECORD_TAIL);
        number.write_to(*fd);
    }
    let code = ExitReason::Forbidden { call: 0 }.code();
    // SAFETY: it ends the process without running anything else of it.
    unsafe { libc::_exit(code.into()) }
}

/// Installs the handler.
///
/// # Errors
/// The system's answer.
pub fn catch() -> io::Result<()> {
    // SAFETY: an all-zero sigaction is valid: no flags, empty mask, default action.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_forbidden;
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the structure is filled; the handler calls nothing but write and _exit.
    match unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Lets the handler leave an exit record behind, too. The descriptor stays open for the life of the process.
pub fn record_in(file: BorrowedFd, vm: VmId) {
    let head = format!("{{\"vm\":\"{vm}\",\"reason\":{{\"kind\":\"forbidden\",\"call\":");
    // Set once: a process has one VM.
    let _ = RECORD.set((file.as_raw_fd(), head));
}
