//! One cgroup v2 leaf per VM below a root that is ours alone.
//!
//! cgroups-rs writes `cpu.max`, `cpu.weight`, `memory.max` and `pids.max`; its controllers are given the leaf's path, because
//! its own tree would switch on every controller from the top of the hierarchy down and takes `/sys/fs/cgroup` for granted.
//! What it does not know (`memory.high`, `memory.oom.group`, `cgroup.kill`, `cgroup.events`) are plain files.

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blixard_vmm_api::VmId;
use cgroups_rs::fs::MaxValue;
use cgroups_rs::fs::cpu::CpuController;
use cgroups_rs::fs::memory::MemController;
use cgroups_rs::fs::pid::PidController;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Controllers that must be there.
pub const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// Prefix of a leaf's name.
const PREFIX: &str = "vm-";
/// Period of `cpu.max` in microseconds (the kernel's default).
const PERIOD_US: u64 = 100_000;
/// Longest wait for a leaf to become empty after its processes were killed.
const EMPTY_TIME_MAX: Duration = Duration::from_secs(5);
/// Longest wait for the processes of a leaf to stop or go on.
const FREEZE_TIME_MAX: Duration = Duration::from_secs(1);
/// Time between two looks at threads that shall stop.
const FREEZE_LOOK: Duration = Duration::from_millis(5);
const MIB: u64 = 1 << 20;

/// Why a cgroup was not made or removed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No cgroup v2 here.
    #[error("{path} is not in a cgroup v2 hierarchy")]
    NotV2 {
        /// The configured root.
        path: PathBuf,
    },
    /// A controller is missing.
    #[error("{path} has no controller {controller}: it was not delegated")]
    NoController {
        /// The configured root.
        path: PathBuf,
        /// Name of the controller.
        controller: &'static str,
    },
    /// A file of a cgroup cannot be used.
    #[error("cannot {operation} {path}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A limit was refused.
    #[error("cannot set {limit} of {path}")]
    Limit {
        /// Name of the file.
        limit: &'static str,
        /// The leaf.
        path: PathBuf,
        /// The answer.
        #[source]
        source: cgroups_rs::fs::error::Error,
    },
    /// It does not become as it was told to.
    #[error("{path} does not become {event:?} in time")]
    Populated {
        /// The leaf.
        path: PathBuf,
        /// What was waited for.
        event: String,
    },
}

/// Limits of one VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Processor time in microseconds per 100 ms.
    pub cpu_quota_us: u64,
    /// Share when processors are scarce, 1 to 10,000.
    pub cpu_weight: u64,
    /// Memory in bytes above which the VMM is slowed down and its page cache taken back.
    pub memory_high: u64,
    /// Memory in bytes above which the VMM is ended.
    pub memory_max: u64,
    /// Most threads.
    pub pids: u32,
}

impl Limits {
    /// The limits of a VM with this many vCPUs and this much memory.
    ///
    /// * Processor: one processor per vCPU and half of one for the VMM's I/O thread; weight 100 per vCPU.
    /// * Memory: the guest's, plus 48 MiB for the VMM, its io_uring buffers and the page cache of its disks, plus 1/64 of the
    ///   guest's for page tables (8 bytes per 4 KiB twice: host and nested, with room), plus 1 MiB per vCPU. It is slowed down
    ///   8 MiB below: page cache goes first.
    /// * Threads: one per vCPU and 64 for I/O threads, io_uring workers and the kernel's own threads of a VM.
    pub fn of(vcpus: u8, memory_mib: u32) -> Self {
        let cpus = u64::from(vcpus);
        let memory = u64::from(memory_mib) * MIB;
        let memory_max = memory + 48 * MIB + memory / 64 + cpus * MIB;
        Self {
            cpu_quota_us: cpus * PERIOD_US + PERIOD_US / 2,
            cpu_weight: (cpus * 100).clamp(1, 10_000),
            memory_high: memory_max - 8 * MIB,
            memory_max,
            pids: u32::from(vcpus) + 64,
        }
    }
}

/// The tree below the agent's root.
#[derive(Debug, Clone)]
pub struct CgroupTree {
    root: PathBuf,
}

fn file_error(operation: &'static str, path: &Path) -> impl Fn(io::Error) -> CgroupError {
    move |source| CgroupError::File { operation, path: path.into(), source }
}

fn write(path: &Path, text: &str) -> Result<(), CgroupError> {
    fs::write(path, text).map_err(file_error("write", path))
}

fn words(path: &Path) -> Result<Vec<String>, CgroupError> {
    let text = fs::read_to_string(path).map_err(file_error("read", path))?;
    Ok(text.split_ascii_whitespace().map(Into::into).collect())
}

/// The cgroup of this process, below the place where cgroup v2 is mounted by convention.
///
/// # Errors
/// There is no cgroup v2.
pub fn own() -> Result<PathBuf, CgroupError> {
    let own = Path::new("/proc/self/cgroup");
    let text = fs::read_to_string(own).map_err(file_error("read", own))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"));
    let path = path.ok_or(CgroupError::NotV2 { path: "/proc/self/cgroup".into() })?;
    Ok(Path::new("/sys/fs/cgroup").join(path))
}

impl CgroupTree {
    /// Makes `root` ready for leaves: it exists, hands down the controllers, and this process, if it is in it, moves to a
    /// leaf of its own (a cgroup with controllers for its children has no processes).
    ///
    /// # Errors
    /// See [`CgroupError`].
    pub fn open(root: &Path) -> Result<Self, CgroupError> {
        match fs::create_dir(root) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(file_error("make", root)(error));
            }
            Err(_) => {}
            // Ours from the start: its parent may not hand down anything yet. What it refuses is missing below.
            Ok(()) => {
                let parent = root.parent().unwrap_or(root).join("cgroup.subtree_control");
                for controller in CONTROLLERS {
                    let _ = write(&parent, &format!("+{controller}"));
                }
            }
        }
        let offered = root.join("cgroup.controllers");
        if !offered.exists() {
            return Err(CgroupError::NotV2 { path: root.into() });
        }
        let offered = words(&offered)?;
        let missing = CONTROLLERS.into_iter().find(|c| !offered.iter().any(|o| o == c));
        if let Some(controller) = missing {
            return Err(CgroupError::NoController { path: root.into(), controller });
        }
        if own().is_ok_and(|own| own == root) {
            let leaf = root.join("agent");
            match fs::create_dir(&leaf) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(file_error("make", &leaf)(error));
                }
                _ => {}
            }
            write(&leaf.join("cgroup.procs"), "0")?;
        }
        for controller in CONTROLLERS {
            write(&root.join("cgroup.subtree_control"), &format!("+{controller}"))?;
        }
        if offered.iter().any(|o| o == "io") {
            // Not needed yet; a kernel may refuse it.
            let _ = write(&root.join("cgroup.subtree_control"), "+io");
        }
        Ok(Self { root: root.into() })
    }

    /// The tree below a root that another process has made ready, or will.
    pub fn of_others(root: &Path) -> Self {
        Self { root: root.into() }
    }

    fn leaf(&self, vm: VmId) -> PathBuf {
        self.root.join(format!("{PREFIX}{vm}"))
    }

    /// VMs that have a leaf.
    ///
    /// # Errors
    /// See [`CgroupError::File`].
    pub fn list(&self) -> Result<Vec<VmId>, CgroupError> {
        let wrong = file_error("list", &self.root);
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(&wrong)? {
            let name = entry.map_err(&wrong)?.file_name();
            let vm: Option<VmId> =
                name.to_str().and_then(|n| n.strip_prefix(PREFIX)).and_then(|n| n.parse().ok());
            found.extend(vm);
        }
        Ok(found)
    }

    /// Makes the leaf of a VM with these limits; one that exists gets them.
    ///
    /// # Errors
    /// See [`CgroupError`].
    pub fn create(&self, vm: VmId, limits: &Limits) -> Result<(), CgroupError> {
        let path = self.leaf(vm);
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(file_error("make", &path)(error));
            }
            _ => {}
        }
        let wrong = |limit| {
            let path = path.clone();
            move |source| CgroupError::Limit { limit, path, source }
        };
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let cpu = CpuController::new(path.clone(), path.clone(), true);
        cpu.set_cfs_quota_and_period(Some(number(limits.cpu_quota_us)), Some(PERIOD_US))
            .map_err(wrong("cpu.max"))?;
        cpu.set_shares(limits.cpu_weight).map_err(wrong("cpu.weight"))?;
        let memory = MemController::new(path.clone(), path.clone(), true);
        memory.set_limit(number(limits.memory_max)).map_err(wrong("memory.max"))?;
        write(&path.join("memory.high"), &limits.memory_high.to_string())?;
        // All threads of a VMM or none: half a VMM is of no use.
        write(&path.join("memory.oom.group"), "1")?;
        let pids = PidController::new(path.clone(), path.clone(), true);
        pids.set_pid_max(MaxValue::Value(i64::from(limits.pids))).map_err(wrong("pids.max"))
    }

    /// Opens the leaf, to start a process in it.
    ///
    /// # Errors
    /// See [`CgroupError::File`].
    pub fn open_leaf(&self, vm: VmId) -> Result<OwnedFd, CgroupError> {
        let path = self.leaf(vm);
        File::open(&path).map(Into::into).map_err(file_error("open", &path))
    }

    /// Processes in the leaf; none when there is no leaf.
    pub fn processes(&self, vm: VmId) -> Vec<i32> {
        let found = words(&self.leaf(vm).join("cgroup.procs")).unwrap_or_default();
        found.iter().filter_map(|pid| pid.parse().ok()).collect()
    }

    /// Memory charged to the VM in bytes.
    pub fn memory_bytes(&self, vm: VmId) -> Option<u64> {
        words(&self.leaf(vm).join("memory.current")).ok()?.first()?.parse().ok()
    }

    /// True when the memory limit ended a process of the VM.
    pub fn ended_by_memory(&self, vm: VmId) -> bool {
        let found = words(&self.leaf(vm).join("memory.events")).unwrap_or_default();
        let mut pairs = found.chunks_exact(2);
        pairs.any(|pair| matches!(pair, [key, count] if key == "oom_kill" && count != "0"))
    }

    /// Ends all processes in the leaf at once.
    ///
    /// # Errors
    /// See [`CgroupError::File`]; a leaf that is not there has no processes.
    pub fn kill(&self, vm: VmId) -> Result<(), CgroupError> {
        let path = self.leaf(vm);
        if path.exists() { write(&path.join("cgroup.kill"), "1") } else { Ok(()) }
    }

    /// Tells the kernel to stop all processes in the leaf until they are thawed, or to let them go on.
    ///
    /// # Errors
    /// See [`CgroupError::File`].
    pub fn freeze(&self, vm: VmId, freeze: bool) -> Result<(), CgroupError> {
        write(&self.leaf(vm).join("cgroup.freeze"), if freeze { "1" } else { "0" })
    }

    /// What [`CgroupTree::freeze`] has told the kernel last, also by another process; `false` when there is no leaf.
    ///
    /// # Errors
    /// See [`CgroupError::File`].
    pub fn told_to_freeze(&self, vm: VmId) -> Result<bool, CgroupError> {
        let path = self.leaf(vm).join("cgroup.freeze");
        match fs::read_to_string(&path) {
            Ok(text) => Ok(text.trim() != "0"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(file_error("read", &path)(error)),
        }
    }

    /// Waits until they have stopped, or go on: each thread stops when it next leaves the guest, which takes it no longer
    /// than a signal does. To be called after [`CgroupTree::freeze`].
    ///
    /// The kernel does not say `frozen 1` while the leaf has a kernel thread, and KVM puts one into it for each VM
    /// (`kvm-nx-lpage-recovery`, vhost workers): these do not stop, and need not. So the other threads are looked at.
    ///
    /// # Errors
    /// See [`CgroupError`].
    pub fn wait_until_frozen(&self, vm: VmId, freeze: bool) -> Result<(), CgroupError> {
        let (path, deadline) = (self.leaf(vm), Instant::now() + FREEZE_TIME_MAX);
        if !freeze {
            return wait_for_event(&path, "frozen 0", deadline);
        }
        loop {
            let threads = words(&path.join("cgroup.threads")).unwrap_or_default();
            // One that has ended runs no more.
            let stat = |thread: &String| fs::read_to_string(format!("/proc/{thread}/stat")).ok();
            if threads.iter().filter_map(stat).all(|stat| stands_still(&stat)) {
                return Ok(());
            }
            match wait_for_event(&path, "frozen 1", deadline.min(Instant::now() + FREEZE_LOOK)) {
                Err(CgroupError::Populated { .. }) if Instant::now() < deadline => {}
                other => return other,
            }
        }
    }

    /// Removes the leaf, ending what is still in it; one that is not there is removed.
    ///
    /// # Errors
    /// [`CgroupError::Populated`] when a process does not end in time.
    pub fn remove(&self, vm: VmId) -> Result<(), CgroupError> {
        let path = self.leaf(vm);
        let deadline = Instant::now() + EMPTY_TIME_MAX;
        loop {
            match fs::remove_dir(&path) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    self.kill(vm)?;
                    wait_until_empty(&path, deadline)?;
                }
                Err(error) => return Err(file_error("remove", &path)(error)),
            }
        }
    }
}

/// Waits for `populated 0` in `cgroup.events` (kernel documentation, admin-guide/cgroup-v2.rst, "\[Un\]populated Notification":
/// the file becomes readable out of band with each change).
fn wait_until_empty(leaf: &Path, deadline: Instant) -> Result<(), CgroupError> {
    wait_for_event(leaf, "populated 0", deadline)
}

/// Whether a thread of a leaf that was told to freeze runs no more, from `/proc/TID/stat` (`man 5 proc`): a kernel thread, or one that
/// sleeps interruptibly or is stopped or dead. Freezing wakes every thread with a signal, which stays pending until the thread
/// stops for it; nothing else sleeps interruptibly with a signal pending.
fn stands_still(stat: &str) -> bool {
    /// `PF_KTHREAD` of linux/sched.h.
    const KERNEL_THREAD: u64 = 0x0020_0000;
    // The name before may hold anything.
    let mut fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
    let state = fields.next().unwrap_or_default();
    let flags = fields.nth(5).and_then(|flags| flags.parse::<u64>().ok()).unwrap_or_default();
    flags & KERNEL_THREAD != 0 || matches!(state, "S" | "T" | "t" | "Z" | "X")
}

fn wait_for_event(leaf: &Path, event: &str, deadline: Instant) -> Result<(), CgroupError> {
    let path = leaf.join("cgroup.events");
    let wrong = file_error("watch", &path);
    let mut file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(wrong(error)),
    };
    loop {
        let mut text = String::new();
        file.rewind().map_err(&wrong)?;
        if file.read_to_string(&mut text).is_err() || text.lines().any(|line| line == event) {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(CgroupError::Populated { path: leaf.into(), event: event.into() });
        }
        let ms = u16::try_from(left.as_millis()).unwrap_or(u16::MAX).saturating_add(1);
        let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
        match poll(&mut fds, PollTimeout::from(ms)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(wrong(errno.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn threads_that_stand_still_are_those_that_sleep_and_those_of_the_kernel() {
        let stat = |name: &str, state: &str, flags: u64| {
            format!("7 ({name}) {state} 1 7 7 0 -1 {flags} 0 0 0 0 18 9")
        };
        assert!(stands_still(&stat("blixard-vmm", "S", 4_194_560)));
        assert!(stands_still(&stat("kvm-nx-lpage-recovery-585", "R", 2_129_984)), "it does not freeze");
        assert!(!stands_still(&stat("vcpu0", "R", 4_194_368)));
        assert!(
            !stands_still(&stat("blixard-vmm", "D", 4_194_560)),
            "it goes on when what it waits for is there"
        );
        assert!(!stands_still(&stat("S) S 1 (S", "R", 4_194_560)), "a name is no state");
        assert!(!stands_still("") && !stands_still("7 (x"));
    }

    proptest! {
        #[test]
        fn limits_leave_room_for_the_guest_and_stay_in_the_kernels_ranges(vcpus in 1u8..=32, memory_mib in 16u32..=1 << 20) {
            let limits = Limits::of(vcpus, memory_mib);
            let guest = u64::from(memory_mib) * MIB;
            prop_assert!(limits.memory_high >= guest + 32 * MIB);
            prop_assert!(limits.memory_high < limits.memory_max);
            prop_assert!((1..=10_000).contains(&limits.cpu_weight));
            prop_assert!(limits.cpu_quota_us > u64::from(vcpus) * PERIOD_US);
        }
    }
}
