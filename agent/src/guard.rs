//! The guard: freezes at the end of the lease what may run elsewhere then, also when the agent is dead or stopped.
//!
//! A process of its own (`blixard-agent guard`, its own unit), since its only purpose is to be there when the agent is not. It owns
//! nothing and is told nothing: it reads what the agent keeps anyway.
//!
//! * `RUN/lease.json`: until when. It sleeps until that moment and looks again, so a lease that is renewed costs it one wake per
//!   length of a lease; while there is none, or nothing is left to freeze, it waits for that file to change.
//! * the node's own file (`--node-lease`): until when, while the agent is dead and cannot be told. VMs run on then, for as long as the
//!   cluster does not start them elsewhere.
//! * `STATE/plan.json`: which VMs run on (`on_lease_end: run_on`). All others are frozen, also those that the plan no longer has: an
//!   agent that died before it ended one has not told anybody that it is gone.
//! * `CGROUP/vm-VMID`: the VMs that are there.
//!
//! It never thaws. The agent does, once it has a lease again, and asks the kernel then what is frozen. So that nothing is frozen
//! that the agent believes to run, both look at the lease and act on it under [`FILE`]: whoever comes second sees what the first did.
//!
//! What may fail: a plan that cannot be read counts as one in which nothing runs on, since a VM that stands still is better than one
//! that runs twice; a VM that cannot be frozen is tried again every 250 ms.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blixard_agent_api::HostPlan;
use blixard_agent_api::plan::OnLeaseEnd;
use blixard_ipc::MESSAGE_BYTES_MAX;
use blixard_vmm_api::VmId;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::cgroup::{CgroupError, CgroupTree};
use crate::config::Config;
use crate::host::sentence;
use crate::lease::{self, Lease};
use crate::{durable, server};

/// Name of the file in the run folder that is locked by whoever looks at the lease and acts on it.
const FILE: &str = "lease.lock";
/// Name of the file in the run folder that a guard holds locked for as long as it lives.
const ALIVE: &str = "guard.lock";
/// Until a VM that could not be frozen is tried again.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// Why there can be no guard.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// A file of the run folder.
    #[error("cannot open {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Somebody else is it.
    #[error("another guard watches {run}")]
    Another {
        /// The run folder.
        run: PathBuf,
    },
    /// The lease cannot be watched.
    #[error("cannot watch the lease in {run}")]
    Watch {
        /// The run folder.
        run: PathBuf,
        /// The kernel's answer.
        #[source]
        source: Errno,
    },
    /// It cannot wait for the end of a lease.
    #[error("cannot wait for the end of a lease")]
    Timer(#[source] Errno),
}

fn open(path: PathBuf) -> Result<File, GuardError> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    file.map_err(|source| GuardError::Open { path, source })
}

/// Waits until nobody else acts on the lease, and keeps others from it until the answer is dropped. A guard holds it for as long as
/// it takes to tell the kernel which VMs to freeze.
///
/// # Errors
/// [`GuardError::Open`].
pub fn lock(run: &Path) -> Result<Flock<File>, GuardError> {
    let path = run.join(FILE);
    let mut file = open(path.clone())?;
    loop {
        match Flock::lock(file, FlockArg::LockExclusive) {
            Ok(locked) => return Ok(locked),
            Err((again, Errno::EINTR)) => file = again,
            Err((_, errno)) => return Err(GuardError::Open { path, source: errno.into() }),
        }
    }
}

/// Whether a guard lives.
///
/// # Errors
/// It cannot be found out.
pub fn lives(run: &Path) -> io::Result<bool> {
    let file = match File::open(run.join(ALIVE)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Ok(_) => Ok(false),
        Err((_, Errno::EWOULDBLOCK)) => Ok(true),
        Err((_, errno)) => Err(errno.into()),
    }
}

/// What a guard waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// This moment in milliseconds of CLOCK_BOOTTIME: the end of the lease, as far as is known.
    End(u64),
    /// Another lease.
    Change,
    /// A VM could not be frozen.
    Again,
}

/// Watches one host.
#[derive(Debug)]
pub struct Guard {
    run: PathBuf,
    state: PathBuf,
    node_lease: PathBuf,
    boot: String,
    tree: CgroupTree,
    /// At the end of this one everything was frozen.
    done: Option<Lease>,
    _alive: Flock<File>,
}

impl Guard {
    /// The guard of a host: where its files are, the cgroup of its VMs, its boot.
    ///
    /// # Errors
    /// See [`GuardError`].
    pub fn new(config: &Config, tree: CgroupTree, boot: String) -> Result<Self, GuardError> {
        let (run, state) = (config.run.clone(), config.state.clone());
        let alive = Flock::lock(open(run.join(ALIVE))?, FlockArg::LockExclusiveNonblock)
            .map_err(|_| GuardError::Another { run: run.clone() })?;
        let node_lease = config.node_lease.clone();
        Ok(Self { run, state, node_lease, boot, tree, done: None, _alive: alive })
    }

    /// Looks at the lease once, and freezes what may not run.
    ///
    /// # Errors
    /// See [`lock`].
    pub fn look(&mut self) -> Result<Next, GuardError> {
        let held = lock(&self.run)?;
        let Some(lease) = lease::stored(&self.run, &self.state, &self.boot) else {
            return Ok(Next::Change);
        };
        if lease::boottime_ms() < lease.until_ms {
            return Ok(Next::End(lease.until_ms));
        }
        let plan = self.plan().unwrap_or_else(|error| {
            tracing::error!(error = sentence(&error), "the plan cannot be read: no VM may run on");
            None
        });
        let plan = plan.unwrap_or_default();
        let lease = lease::extended(lease, &self.node_lease, plan.generation);
        if lease::boottime_ms() < lease.until_ms {
            return Ok(Next::End(lease.until_ms));
        }
        if self.done.as_ref() == Some(&lease) {
            return Ok(Next::Change);
        }
        let (told, failed) = self.freeze(&plan);
        drop(held);
        for vm in &told {
            match self.tree.wait_until_frozen(*vm, true) {
                Ok(()) => tracing::warn!(%vm, "lease: VM frozen"),
                Err(error) => tracing::warn!(%vm, error = sentence(&error), "it was told to freeze"),
            }
        }
        if failed {
            return Ok(Next::Again);
        }
        self.done = Some(lease);
        Ok(Next::Change)
    }

    /// Tells the kernel to freeze: the VMs that it was told about, and whether one could not be.
    fn freeze(&self, plan: &HostPlan) -> (Vec<VmId>, bool) {
        let run_on = plan.vms.iter().filter(|vm| vm.on_lease_end == OnLeaseEnd::RunOn);
        let run_on: BTreeSet<VmId> = run_on.map(|vm| vm.vm).collect();
        let there = match self.tree.list() {
            Ok(there) => there,
            // No agent has run here since the boot.
            Err(CgroupError::File { source, .. }) if is_gone(&source) => return (Vec::new(), false),
            Err(error) => {
                tracing::error!(error = sentence(&error), "cannot freeze VMs");
                return (Vec::new(), true);
            }
        };
        let (mut told, mut failed) = (Vec::new(), false);
        for vm in there.into_iter().filter(|vm| !run_on.contains(vm)) {
            match self.tree.freeze(vm, true) {
                Ok(()) => told.push(vm),
                // It has ended meanwhile.
                Err(CgroupError::File { source, .. }) if is_gone(&source) => {}
                Err(error) => {
                    tracing::error!(%vm, error = sentence(&error), "cannot freeze a VM");
                    failed = true;
                }
            }
        }
        (told, failed)
    }

    fn plan(&self) -> io::Result<Option<HostPlan>> {
        let text = durable::read_bounded(&self.state.join(server::PLAN_FILE), MESSAGE_BYTES_MAX)?;
        Ok(text.map(|text| serde_json::from_slice(&text)).transpose()?)
    }

    /// Looks, and waits for what comes next, for ever. `ready` is called once nothing can be missed.
    ///
    /// # Errors
    /// See [`GuardError`].
    pub fn run(mut self, ready: impl FnOnce()) -> Result<Infallible, GuardError> {
        let unwatched = |source| GuardError::Watch { run: self.run.clone(), source };
        let changes = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).map_err(unwatched)?;
        // The lease is replaced by a rename, and removed when the time of leases ends.
        changes
            .add_watch(&self.run, AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_DELETE)
            .map_err(unwatched)?;
        let timer =
            TimerFd::new(ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_CLOEXEC).map_err(GuardError::Timer)?;
        let mut ready = Some(ready);
        loop {
            // Before it is looked at: what changes later is seen.
            match changes.read_events() {
                Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(source) => return Err(GuardError::Watch { run: self.run, source }),
            }
            let next = self.look()?;
            if let Some(ready) = ready.take() {
                ready();
            }
            match next {
                Next::Change => {
                    let mut changed = [PollFd::new(changes.as_fd(), PollFlags::POLLIN)];
                    match poll(&mut changed, PollTimeout::NONE) {
                        Ok(_) | Err(Errno::EINTR) => {}
                        Err(source) => return Err(GuardError::Watch { run: self.run, source }),
                    }
                }
                Next::End(until_ms) => {
                    let until = Expiration::OneShot(Duration::from_millis(until_ms).into());
                    wait(&timer, until, TimerSetTimeFlags::TFD_TIMER_ABSTIME)?;
                }
                Next::Again => {
                    wait(&timer, Expiration::OneShot(LOOK_AGAIN.into()), TimerSetTimeFlags::empty())?;
                }
            }
        }
    }
}

fn wait(timer: &TimerFd, until: Expiration, flags: TimerSetTimeFlags) -> Result<(), GuardError> {
    timer.set(until, flags).map_err(GuardError::Timer)?;
    match timer.wait() {
        Ok(()) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(GuardError::Timer(errno)),
    }
}

/// What is tried with a cgroup that has been removed.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

#[cfg(test)]
mod tests {
    use blixard_agent_api::{Generation, HeldLease, VmPlan};
    use tempfile::TempDir;

    use super::*;
    use crate::config::Settings;

    /// A host whose cgroups are folders: what the kernel is told is in their files.
    struct Stage {
        folder: TempDir,
    }

    impl Stage {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            for name in ["run", "state", "cgroup"] {
                std::fs::create_dir(folder.path().join(name)).unwrap();
            }
            Self { folder }
        }

        fn at(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        fn guard(&self) -> Result<Guard, GuardError> {
            let (run, state) = (Some(self.at("run")), Some(self.at("state")));
            let settings =
                Settings { run, state, node_lease: Some(self.at("node.json")), ..Settings::default() };
            let config = Config::new(settings, None).unwrap();
            Guard::new(&config, CgroupTree::of_others(&self.at("cgroup")), "b".into())
        }

        fn lease(&self, until_ms: u64) {
            let lease = Lease { boot: "b".into(), until_ms };
            durable::put(&self.at("run/lease.json"), &serde_json::to_vec(&lease).unwrap()).unwrap();
        }

        /// A VM that is there: whether it was told to freeze.
        fn vm(&self, number: u8) -> (VmId, PathBuf) {
            let vm = VmId::from_parts(1_795_000_000_000, number.into());
            let leaf = self.at("cgroup").join(format!("vm-{vm}"));
            std::fs::create_dir(&leaf).unwrap();
            (vm, leaf.join("cgroup.freeze"))
        }

        /// The node says that it has a lease for ten minutes, which is about this plan.
        fn held(&self, boot: &str, generation: u64) -> u64 {
            let until_ms = lease::boottime_ms() + 600_000;
            let held = HeldLease { boot: boot.into(), until_ms, generation: Generation(generation) };
            held.put(&self.at("node.json")).unwrap();
            until_ms
        }

        fn plan(&self, vms: &[(VmId, OnLeaseEnd)]) {
            let vm = |(vm, on_lease_end): &(VmId, OnLeaseEnd)| {
                let mut plan: VmPlan = serde_json::from_str(include_str!("../tests/plan.json")).unwrap();
                (plan.vm, plan.on_lease_end) = (*vm, *on_lease_end);
                plan
            };
            let plan = HostPlan {
                generation: Generation(7),
                vms: vms.iter().map(vm).collect(),
                ..HostPlan::default()
            };
            std::fs::write(self.at("state/plan.json"), serde_json::to_vec(&plan).unwrap()).unwrap();
        }
    }

    fn told(file: &Path) -> Option<String> {
        std::fs::read_to_string(file).ok()
    }

    #[test]
    fn at_the_end_of_the_lease_all_are_frozen_but_those_that_run_on() {
        let stage = Stage::new();
        let ((moves, moves_file), (stays, stays_file), (_, forgotten_file)) =
            (stage.vm(1), stage.vm(2), stage.vm(3));
        stage.plan(&[(moves, OnLeaseEnd::Freeze), (stays, OnLeaseEnd::RunOn)]);
        let mut guard = stage.guard().unwrap();
        assert_eq!(guard.look().unwrap(), Next::Change, "a host without leases");
        let until = lease::boottime_ms() + 600_000;
        stage.lease(until);
        assert_eq!(guard.look().unwrap(), Next::End(until));
        assert_eq!((told(&moves_file), told(&forgotten_file)), (None, None));
        stage.lease(1);
        assert_eq!(guard.look().unwrap(), Next::Change);
        assert_eq!(told(&moves_file).as_deref(), Some("1"));
        assert_eq!(told(&forgotten_file).as_deref(), Some("1"), "the plan no longer has it, and it is there");
        assert_eq!(told(&stays_file), None);
    }

    #[test]
    fn what_the_agent_thaws_afterwards_stays_so_until_the_next_lease_ends() {
        let stage = Stage::new();
        let (moves, file) = stage.vm(1);
        stage.plan(&[(moves, OnLeaseEnd::Freeze)]);
        let mut guard = stage.guard().unwrap();
        stage.lease(1);
        guard.look().unwrap();
        std::fs::write(&file, "0").unwrap();
        assert_eq!(guard.look().unwrap(), Next::Change);
        assert_eq!(told(&file).as_deref(), Some("0"), "the same lease ends once");
        stage.lease(2);
        guard.look().unwrap();
        assert_eq!(told(&file).as_deref(), Some("1"));
    }

    #[test]
    fn what_the_node_still_has_a_lease_for_runs_on_while_the_agent_is_dead() {
        let stage = Stage::new();
        let (moves, file) = stage.vm(1);
        stage.plan(&[(moves, OnLeaseEnd::Freeze)]);
        let mut guard = stage.guard().unwrap();
        stage.lease(1);
        let until = stage.held("b", 7);
        assert_eq!(guard.look().unwrap(), Next::End(until));
        assert_eq!(told(&file), None);
        for (boot, generation) in [("another", 7), ("b", 8)] {
            stage.lease(2 + generation);
            stage.held(boot, generation);
            assert_eq!(guard.look().unwrap(), Next::Change, "about boot {boot} and plan {generation}");
            assert_eq!(told(&file).as_deref(), Some("1"));
            std::fs::remove_file(&file).unwrap();
        }
    }

    #[test]
    fn without_a_plan_that_can_be_read_everything_is_frozen() {
        let stage = Stage::new();
        let (_, file) = stage.vm(1);
        std::fs::write(stage.at("state/plan.json"), b"{\"vms\": [").unwrap();
        stage.lease(1);
        stage.guard().unwrap().look().unwrap();
        assert_eq!(told(&file).as_deref(), Some("1"));
    }

    #[test]
    fn a_vm_that_cannot_be_frozen_is_tried_again_and_one_that_is_gone_is_not() {
        let stage = Stage::new();
        let (_, file) = stage.vm(1);
        std::fs::create_dir(&file).unwrap();
        stage.lease(1);
        let mut guard = stage.guard().unwrap();
        assert_eq!(guard.look().unwrap(), Next::Again);
        std::fs::remove_dir_all(file.parent().unwrap()).unwrap();
        assert_eq!(guard.look().unwrap(), Next::Change);
    }

    #[test]
    fn there_is_one_guard_and_others_can_tell() {
        let stage = Stage::new();
        assert!(!lives(&stage.at("run")).unwrap());
        let guard = stage.guard().unwrap();
        assert!(lives(&stage.at("run")).unwrap());
        assert!(matches!(stage.guard(), Err(GuardError::Another { .. })));
        drop(guard);
        assert!(!lives(&stage.at("run")).unwrap());
    }

    #[test]
    fn a_guard_that_runs_freezes_when_the_lease_ends_and_after_another_one_ends() {
        let stage = Stage::new();
        let (moves, file) = stage.vm(1);
        stage.plan(&[(moves, OnLeaseEnd::Freeze)]);
        let guard = stage.guard().unwrap();
        let (ready, is_ready) = std::sync::mpsc::channel();
        // Ends with the test's process: it waits for leases for ever.
        std::thread::spawn(move || guard.run(|| ready.send(()).unwrap()).unwrap_err());
        is_ready.recv().unwrap();
        let watch = Inotify::init(InitFlags::IN_CLOEXEC).unwrap();
        watch.add_watch(file.parent().unwrap(), AddWatchFlags::IN_CLOSE_WRITE).unwrap();
        for _ in 0..2 {
            let until = lease::boottime_ms() + 50;
            stage.lease(until);
            watch.read_events().unwrap();
            assert!(lease::boottime_ms() >= until, "not before its end");
            assert_eq!(told(&file).as_deref(), Some("1"));
        }
    }
}
