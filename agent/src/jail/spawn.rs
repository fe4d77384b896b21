//! `clone3` and what the new process does before it executes the program. The only code of the agent that runs in a copy of
//! a process with threads: system calls on memory that was made before, no allocation, no lock, no panic.

use std::convert::Infallible;
use std::ffi::{CStr, CString, c_char, c_long, c_ulong};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};

/// Most descriptors of one process (`RLIMIT_NOFILE`): 32 vCPUs, 16 disks and 8 nics with their event descriptors, and 256
/// connections.
const FILES_MAX: u64 = 1024;
/// Most locked memory in bytes (`RLIMIT_MEMLOCK`): registered io_uring buffers.
const LOCKED_BYTES_MAX: u64 = 16 << 20;
/// Exit code of a process that could not lock itself in.
const EXIT_CODE: c_long = 127;

/// All that the new process needs, made before it exists.
pub struct Child<'a> {
    /// What becomes descriptor 0, 1, 2, …
    targets: Vec<RawFd>,
    program: RawFd,
    report: RawFd,
    /// Lowest number that is neither in use nor a target.
    free: RawFd,
    root: &'a CStr,
    identity: u32,
    arguments: Vec<*const c_char>,
    limits: [(c_long, libc::rlimit64); 3],
}

/// A limit that is at most `most`, and not above what this process has: raising it would need one capability more.
fn limit(kind: Resource, number: c_long, most: u64) -> (c_long, libc::rlimit64) {
    let value = getrlimit(kind).map_or(most, |(_, hard)| hard.min(most));
    (number, libc::rlimit64 { rlim_cur: value, rlim_max: value })
}

impl<'a> Child<'a> {
    pub fn new(
        targets: Vec<RawFd>,
        program: RawFd,
        report: RawFd,
        root: &'a CStr,
        identity: u32,
        arguments: &'a [CString],
    ) -> Self {
        let highest = targets.iter().copied().chain([program, report]).max().unwrap_or(0);
        let count = RawFd::try_from(targets.len()).unwrap_or(RawFd::MAX);
        let mut words: Vec<*const c_char> = arguments.iter().map(|word| word.as_ptr()).collect();
        words.push(std::ptr::null());
        let free = highest.max(count.saturating_add(2)).saturating_add(1);
        let limits = [
            limit(Resource::RLIMIT_NOFILE, c_long::from(libc::RLIMIT_NOFILE), FILES_MAX),
            limit(Resource::RLIMIT_CORE, c_long::from(libc::RLIMIT_CORE), 0),
            limit(Resource::RLIMIT_MEMLOCK, c_long::from(libc::RLIMIT_MEMLOCK), LOCKED_BYTES_MAX),
        ];
        Self { targets, program, report, free, root, identity, arguments: words, limits }
    }
}

/// `struct clone_args` (include/uapi/linux/sched.h, size 88: with `cgroup`).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// `CLONE_INTO_CGROUP` does not fit the type that libc gives the other flags.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

fn unsigned(flags: i32) -> u64 {
    u64::from(flags.cast_unsigned())
}

/// Starts the new process and answers its id and descriptor.
pub fn clone_into(cgroup: Option<RawFd>, child: &Child) -> io::Result<(i32, OwnedFd)> {
    let mut pidfd: RawFd = -1;
    let namespaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    let mut args = CloneArgs {
        flags: unsigned(namespaces | libc::CLONE_PIDFD),
        pidfd: (&raw mut pidfd).expose_provenance() as u64,
        exit_signal: unsigned(libc::SIGCHLD),
        ..CloneArgs::default()
    };
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = unsigned(cgroup);
    }
    // SAFETY: without CLONE_VM and with no stack given this is a fork: both sides go on here, each with its own memory.
    // The kernel writes one descriptor to `pidfd`, which outlives the call. The copy runs only `live`, which allocates
    // nothing and takes no lock that another thread may have held at this moment, and never returns.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    if pid == 0 {
        live(child);
    }
    let pid = i32::try_from(Errno::result(pid)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
    Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

/// An argument of a system call: a number, or memory that is borrowed while the call runs.
#[derive(Clone, Copy)]
enum Arg<'a> {
    Number(c_long),
    Flags(c_ulong),
    Text(&'a CStr),
    Words(&'a [*const c_char]),
    Limit(&'a libc::rlimit64),
    Mask(&'a u64),
    Bytes(&'a [u8]),
    Null,
}

use Arg::{Bytes, Flags, Limit, Mask, Null, Number, Text, Words};

fn fd(number: RawFd) -> Arg<'static> {
    Number(c_long::from(number))
}

/// One system call of the new process, all of which only read the memory that they are given.
fn call(number: c_long, args: [Arg; 5]) -> Result<c_long, i32> {
    let [a, b, c, d, e] = args.map(|arg| match arg {
        Number(n) => n,
        Flags(n) => n.cast_signed(),
        Text(text) => text.as_ptr() as c_long,
        Words(words) => words.as_ptr() as c_long,
        Limit(limit) => std::ptr::from_ref(limit) as c_long,
        Mask(mask) => std::ptr::from_ref(mask) as c_long,
        Bytes(bytes) => bytes.as_ptr() as c_long,
        Null => 0,
    });
    // SAFETY: each pointer comes from a reference that lives until the call returns, the calls made in this file read what
    // they are given and write nothing, and `Words` ends with a null pointer to words that live as long.
    let answer = unsafe { libc::syscall(number, a, b, c, d, e) };
    if answer == -1 { Err(Errno::last_raw()) } else { Ok(answer) }
}

/// The deeds, for the report of a failure.
const DEEDS: [&str; 14] = [
    "hand over descriptors",
    "unblock signals",
    "begin a session",
    "keep its mounts to itself",
    "mount an empty root",
    "enter the empty root",
    "detach the host's files",
    "hide the host's name",
    "limit itself",
    "leave its groups",
    "empty its bounding set",
    "become the VM's user",
    "give up new privileges",
    "execute the program",
];

/// The words for a deed.
pub fn deed_name(number: u8) -> &'static str {
    DEEDS.get(usize::from(number)).copied().unwrap_or("do something unknown")
}

fn live(child: &Child) -> ! {
    // The pipe first moves out of the way of the numbers that are handed over.
    let copy = [fd(child.report), fd(child.free), fd(libc::O_CLOEXEC), Null, Null];
    let (pipe, (deed, errno)) = match call(libc::SYS_dup3, copy) {
        Err(errno) => (child.report, (0, errno)),
        Ok(_) => {
            let Err(failure) = lock_in(child);
            (child.free, failure)
        }
    };
    let [a, b, c, d] = errno.to_le_bytes();
    let report = [deed, a, b, c, d];
    let _ = call(libc::SYS_write, [fd(pipe), Bytes(&report), Number(5), Null, Null]);
    loop {
        let _ = call(libc::SYS_exit_group, [Number(EXIT_CODE), Null, Null, Null, Null]);
    }
}

/// All deeds in order; answers the number of the one that failed and the system's answer.
fn lock_in(child: &Child) -> Result<Infallible, (u8, i32)> {
    let at = |deed: u8| move |errno: i32| (deed, errno);
    hand_over(child).map_err(at(0))?;

    let no_signal = 0_u64;
    let set = [Number(c_long::from(libc::SIG_SETMASK)), Mask(&no_signal), Null, Number(8), Null];
    call(libc::SYS_rt_sigprocmask, set).map_err(at(1))?;
    call(libc::SYS_setsid, [Null; 5]).map_err(at(2))?;
    enter_empty_root(child.root)?;
    call(libc::SYS_sethostname, [Text(c"vm"), Number(2), Null, Null, Null]).map_err(at(7))?;

    for (number, value) in &child.limits {
        let args = [Number(0), Number(*number), Limit(value), Null, Null];
        call(libc::SYS_prlimit64, args).map_err(at(8))?;
    }

    call(libc::SYS_setgroups, [Null; 5]).map_err(at(9))?;
    for capability in 0..64 {
        let drop = [fd(libc::PR_CAPBSET_DROP), Number(capability), Null, Null, Null];
        match call(libc::SYS_prctl, drop) {
            Ok(_) => {}
            // The kernel's last capability was the one before.
            Err(libc::EINVAL) => break,
            Err(errno) => return Err((10, errno)),
        }
    }
    let id = Number(c_long::from(child.identity));
    call(libc::SYS_setresgid, [id, id, id, Null, Null]).map_err(at(11))?;
    call(libc::SYS_setresuid, [id, id, id, Null, Null]).map_err(at(11))?;
    let no_new = [fd(libc::PR_SET_NO_NEW_PRIVS), Number(1), Null, Null, Null];
    call(libc::SYS_prctl, no_new).map_err(at(12))?;

    let environment = [std::ptr::null()];
    let program = fd(child.free.saturating_add(1));
    let words = [program, Text(c""), Words(&child.arguments), Words(&environment), fd(libc::AT_EMPTY_PATH)];
    match call(libc::SYS_execveat, words) {
        Err(errno) => Err((13, errno)),
        Ok(_) => Err((13, 0)),
    }
}

/// Gives the descriptors their numbers and closes all others. Everything is first copied above all numbers that are needed:
/// a target may be the number of another source. The pipe and the program stay there, and close when the program runs.
fn hand_over(child: &Child) -> Result<(), i32> {
    let keep = fd(libc::O_CLOEXEC);
    let (report, program, above) = (child.free, child.free.saturating_add(1), child.free.saturating_add(2));
    call(libc::SYS_dup3, [fd(child.program), fd(program), keep, Null, Null])?;
    let mut high = above;
    for source in &child.targets {
        call(libc::SYS_dup3, [fd(*source), fd(high), keep, Null, Null])?;
        high = high.saturating_add(1);
    }
    let mut target = 0;
    for copy in above..high {
        call(libc::SYS_dup3, [fd(copy), fd(target), Null, Null, Null])?;
        target = target.saturating_add(1);
    }
    let last = Flags(c_ulong::from(u32::MAX));
    call(libc::SYS_close_range, [fd(target), fd(report.saturating_sub(1)), Null, Null, Null])?;
    call(libc::SYS_close_range, [fd(above), last, Null, Null, Null])?;
    Ok(())
}

/// Mounts an empty read-only tmpfs and makes it the root (`pivot_root(2)`, "pivot_root(".", ".")").
fn enter_empty_root(root: &CStr) -> Result<(), (u8, i32)> {
    let at = |deed: u8| move |errno: i32| (deed, errno);
    let private = Flags(libc::MS_REC | libc::MS_PRIVATE);
    call(libc::SYS_mount, [Null, Text(c"/"), Null, private, Null]).map_err(at(3))?;
    let flags = Flags(libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC);
    let options = Text(c"mode=0555,size=4k,nr_inodes=2");
    call(libc::SYS_mount, [Text(c"tmpfs"), Text(root), Text(c"tmpfs"), flags, options]).map_err(at(4))?;
    call(libc::SYS_chdir, [Text(root), Null, Null, Null, Null]).map_err(at(5))?;
    call(libc::SYS_pivot_root, [Text(c"."), Text(c"."), Null, Null, Null]).map_err(at(5))?;
    let detach = fd(libc::MNT_DETACH);
    call(libc::SYS_umount2, [Text(c"."), detach, Null, Null, Null]).map_err(at(6))?;
    call(libc::SYS_chdir, [Text(c"/"), Null, Null, Null, Null]).map_err(at(6))?;
    Ok(())
}
