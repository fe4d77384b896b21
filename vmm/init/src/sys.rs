//! The system calls that have no safe wrapper: reaping with any signal number, terminals, what a child does before it
//! executes its program. All `unsafe` of this crate is here.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use blixard_vmm_api::guest::WorkloadExit;
use nix::sys::signal::{self, SigHandler, Signal};
use nix::unistd::{Gid, Uid};

/// Blocks until some child has ended and leaves it to be reaped.
///
/// # Errors
/// `ECHILD` when there is no child.
pub fn wait_for_any_exit() -> io::Result<()> {
    // SAFETY: all bytes zero is a valid siginfo_t: it is plain data.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is a live, exclusively borrowed siginfo_t for the duration of the call.
    let result = unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, libc::WEXITED | libc::WNOWAIT) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Reaps one child that has ended, if there is one. (nix's waitpid loses a child that a real-time signal ended.)
pub fn reap_one() -> Option<(i32, WorkloadExit)> {
    let mut status = 0;
    // SAFETY: `status` is a live, exclusively borrowed c_int for the duration of the call.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
    let low = |number: i32| u8::try_from(number).unwrap_or(u8::MAX);
    match pid {
        1.. if libc::WIFEXITED(status) => Some((pid, WorkloadExit::Code(low(libc::WEXITSTATUS(status))))),
        1.. => Some((pid, WorkloadExit::Signal(low(libc::WTERMSIG(status))))),
        _ => None,
    }
}

/// Sends a signal, as kill(2): a negative `target` is a process group, -1 all processes.
///
/// # Errors
/// There is no such process or no such signal.
pub fn kill(target: i32, signal: i32) -> io::Result<()> {
    // SAFETY: kill takes two integers and touches no memory of ours.
    let result = unsafe { libc::kill(target, signal) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sets the size of a terminal in characters.
///
/// # Errors
/// `terminal` is none.
pub fn set_terminal_size(terminal: BorrowedFd<'_>, columns: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize, which `size` is, and keeps no pointer to it.
    let result = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Waits until one of `descriptors` is ready for its events (as poll(2) names them) or `limit` is over; the answer is
/// what each is ready for. An interrupted wait is one that found nothing. (nix's poll does not know `POLLRDHUP`.)
pub fn poll(descriptors: &[(BorrowedFd<'_>, i16)], limit: Option<Duration>) -> Vec<i16> {
    let entry = |(fd, events): &(BorrowedFd<'_>, i16)| libc::pollfd {
        fd: fd.as_raw_fd(),
        events: *events,
        revents: 0,
    };
    let mut entries: Vec<_> = descriptors.iter().map(entry).collect();
    // Rounded up: a wait of less than a millisecond would otherwise spin.
    let timeout = limit.map_or(-1, |limit| i32::try_from(limit.as_millis() + 1).unwrap_or(i32::MAX));
    let count = libc::nfds_t::try_from(entries.len()).unwrap_or(0);
    // SAFETY: `entries` is a live, exclusively borrowed array of `count` pollfd for the duration of the call, and its
    // descriptors are borrowed by the caller for as long.
    let _found = unsafe { libc::poll(entries.as_mut_ptr(), count, timeout) };
    entries.into_iter().map(|entry| entry.revents).collect()
}

/// Sets the wall clock to this time since 1970.
///
/// # Errors
/// As clock_settime(2).
pub fn set_clock(time: Duration) -> io::Result<()> {
    let now = libc::timespec {
        tv_sec: time.as_secs().try_into().unwrap_or_default(),
        tv_nsec: time.subsec_nanos().into(),
    };
    // SAFETY: the pointer is to a timespec that outlives the call.
    let result = unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &raw const now) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Adds random bytes to the kernel's pool (`RNDADDENTROPY`) and makes it use them at once (`RNDRESEEDCRNG`).
///
/// # Errors
/// `random` is not the kernel's random device.
pub fn reseed(random: BorrowedFd<'_>, seed: &[u8; 32]) -> io::Result<()> {
    const RNDADDENTROPY: libc::c_int = 0x4008_5203;
    const RNDRESEEDCRNG: libc::c_int = 0x5207;
    /// `struct rand_pool_info`: bits, bytes, the bytes.
    #[repr(C)]
    struct Pool {
        bits: i32,
        bytes: i32,
        seed: [u8; 32],
    }
    let pool = Pool { bits: 256, bytes: 32, seed: *seed };
    // SAFETY: RNDADDENTROPY reads the two numbers and as many bytes as the second says, which are there.
    if unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const pool) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: RNDRESEEDCRNG has no argument.
    let result = unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// How many bytes can be read from a pipe now.
///
/// # Errors
/// `pipe` is none.
pub fn readable_bytes(pipe: BorrowedFd<'_>) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int, which `count` is, exclusively borrowed for the duration of the call.
    let result = unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut count) };
    if result == 0 { Ok(usize::try_from(count).unwrap_or(0)) } else { Err(io::Error::last_os_error()) }
}

/// Takes the next connection of a listening socket.
///
/// # Errors
/// As accept4(2).
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let (none, flags) = (std::ptr::null_mut(), libc::SOCK_CLOEXEC);
    // SAFETY: null pointers for address and length are allowed: the peer's address is not asked for.
    let descriptor = unsafe { libc::accept4(listener.as_raw_fd(), none, std::ptr::null_mut(), flags) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: accept4 has just made this descriptor for us; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Makes the child of `command` the leader of a new session, with its standard input as controlling terminal if
/// `terminal`, and gives up root for this user after that. Signals do to it what they do by default: one that is ignored stays
/// so over fork and exec otherwise, and Ctrl-C would do nothing.
pub fn begin_session_as(command: &mut Command, terminal: bool, uid: Uid, gid: Gid, groups: Vec<Gid>) {
    let steps = move || {
        nix::unistd::setsid()?;
        for signal in Signal::iterator().filter(|s| !matches!(s, Signal::SIGKILL | Signal::SIGSTOP)) {
            // SAFETY: the default action runs no code of this process.
            unsafe { signal::signal(signal, SigHandler::SigDfl) }?;
        }
        if terminal {
            // SAFETY: TIOCSCTTY takes an integer argument; descriptor 0 is the child's standard input.
            let result = unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        // An ordinary user (tests) cannot set groups, and has nothing to give up.
        if nix::unistd::geteuid().is_root() {
            nix::unistd::setgroups(&groups)?;
            nix::unistd::setgid(gid)?;
            nix::unistd::setuid(uid)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls only (setsid, sigaction, ioctl, geteuid, setgroups, setgid,
    // setuid): it takes no lock and allocates nothing. `groups` was allocated before the fork and is only read.
    unsafe { command.pre_exec(steps) };
}
