//! VMM processes by pidfd: a number that cannot come to mean another process.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};

use crate::record::ProcessId;

/// When a process was started, in clock ticks since boot (`proc_pid_stat(5)`, field 22); `None` when it is gone.
pub fn started(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name of the program may hold spaces and parentheses: fields are counted from its end.
    let (_, rest) = text.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// Opens a running process.
///
/// # Errors
/// The system's answer, `ESRCH` when there is none.
pub fn open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two numbers and touches no memory of ours.
    let number = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let number = i32::try_from(Errno::result(number)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Opens the process that was recorded; `None` when it is gone, also when its number has been given to another.
pub fn open_recorded(recorded: ProcessId) -> Option<OwnedFd> {
    let fd = open(recorded.pid).ok()?;
    // Compared after opening: from here on the descriptor means the process whose start time was read.
    (started(recorded.pid) == Some(recorded.started) && !has_ended(&fd)).then_some(fd)
}

/// Sends SIGKILL.
///
/// # Errors
/// The system's answer; a process that has ended is no error.
pub fn kill(process: &impl AsFd) -> io::Result<()> {
    signal(process, libc::SIGKILL)
}

fn signal(process: &impl AsFd, number: libc::c_int) -> io::Result<()> {
    let fd = process.as_fd().as_raw_fd();
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: the descriptor is open while it is borrowed; a null siginfo means the same as kill(2).
    let answer = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, number, none, 0) };
    match Errno::result(answer) {
        Ok(_) | Err(Errno::ESRCH) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Sends SIGSTOP, or SIGCONT to go on.
///
/// # Errors
/// The system's answer; a process that has ended is no error.
pub fn hold(process: &impl AsFd, hold: bool) -> io::Result<()> {
    signal(process, if hold { libc::SIGSTOP } else { libc::SIGCONT })
}

/// True when the process has ended.
pub fn has_ended(process: &impl AsFd) -> bool {
    let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(n) if n > 0)
}

/// How a process of ours ended, as words for people; reaps it. `None` when it is no child of this agent: then init has
/// reaped it and nobody can tell.
pub fn outcome(process: &impl AsFd) -> Option<String> {
    match waitid(Id::PIDFd(process.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG) {
        Ok(WaitStatus::Exited(_, code)) => Some(format!("exit code {code}")),
        Ok(WaitStatus::Signaled(_, signal, _)) => Some(format!("signal {signal}")),
        _ => None,
    }
}

/// Waits until the process has ended; false when it has not by `deadline`.
pub fn wait_until(process: &impl AsFd, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let ms = u16::try_from(left.as_millis()).unwrap_or(u16::MAX);
        let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::from(ms)) {
            Ok(0) if left.is_zero() => return false,
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return true,
            Err(_) => return false,
        }
    }
}
