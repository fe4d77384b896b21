//! An agent without a host: it speaks the real protocol on a real socket, and its VMs are entries in a table. Whole control
//! planes run with it on any machine, and tests decide what happens to a VM and when.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use blixard_agent_api::report::Capacity;
use blixard_agent_api::request::FindingState;
use blixard_agent_api::{
    BlobRef, Finding, HostPlan, HostReport, Phase, Problem, ProblemKind, Reply, Request, Run, VmPlan,
    VmReport,
};
use blixard_ipc::{Connection, IpcError, Listener, MESSAGE_BYTES_MAX};
use blixard_vmm_api::{ExitReason, VmId};

/// Longest wait of a test for something to happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// How the agent treats its VMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// A VM that shall run is ready at once, one that shall stop has stopped at once, one that shall go is gone at once.
    Prompt,
    /// VMs stay where the test put them; a VM that shall go stays until [`SimAgent::finish_removals`].
    Manual,
}

/// A running agent. Dropping it ends it: its socket goes, as if the process had died.
pub struct SimAgent {
    socket: PathBuf,
    shared: Arc<Shared>,
    server: Option<std::thread::JoinHandle<()>>,
}

struct Shared {
    world: Mutex<World>,
    changed: Condvar,
    ended: AtomicBool,
}

struct World {
    manner: Manner,
    instance: u64,
    revision: u64,
    plan: HostPlan,
    vms: BTreeMap<VmId, VmReport>,
    blobs: BTreeSet<BlobRef>,
    /// Content is asked for; otherwise everything counts as being here.
    wants_blobs: bool,
    capacity: Capacity,
    logs: BTreeMap<VmId, File>,
    plans: usize,
    lease: Option<u64>,
}

impl Shared {
    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the world and tells everybody.
    fn change<T>(&self, change: impl FnOnce(&mut World) -> T) -> T {
        let mut world = self.world();
        let result = change(&mut world);
        world.settle();
        world.revision += 1;
        self.changed.notify_all();
        result
    }
}

impl World {
    fn missing(&self) -> Vec<BlobRef> {
        if !self.wants_blobs {
            return Vec::new();
        }
        let of_vms = self.plan.vms.iter().flat_map(|vm| [vm.kernel, vm.initramfs, vm.image]);
        let wanted: BTreeSet<BlobRef> = of_vms.chain(self.plan.blobs.iter().copied()).collect();
        wanted.difference(&self.blobs).copied().collect()
    }

    fn report(&self) -> HostReport {
        HostReport {
            revision: self.revision,
            agent_instance: self.instance,
            generation: self.plan.generation,
            vms: self.vms.values().cloned().collect(),
            missing: self.missing(),
            blobs: self.blobs.iter().copied().collect(),
            capacity: self.capacity,
            problems: Vec::new(),
            leased: self.lease.is_some(),
        }
    }

    /// One step toward the plan, as far as the manner goes.
    fn settle(&mut self) {
        let missing = self.missing();
        for plan in &self.plan.vms {
            let vm = self.vms.entry(plan.vm).or_insert_with(|| VmReport::pending(plan.vm, plan.epoch));
            vm.epoch = plan.epoch;
            if self.manner == Manner::Manual {
                continue;
            }
            let waits = [plan.kernel, plan.initramfs, plan.image].iter().any(|blob| missing.contains(blob));
            match plan.run {
                Run::Running if vm.start >= plan.start => {}
                Run::Running if waits => {
                    vm.phase = Phase::Preparing;
                    vm.reason = Some("waits for content".into());
                }
                Run::Running => *vm = running(plan),
                Run::Stopped { .. } => {
                    if vm.phase == Phase::Running {
                        vm.exit = Some(ExitReason::PowerOff);
                        vm.ended_at_ms = vm.started_at_ms;
                    }
                    vm.phase = Phase::Stopped;
                    vm.guest_ready = false;
                }
            }
        }
        if self.manner == Manner::Prompt {
            let planned: BTreeSet<VmId> = self.plan.vms.iter().map(|vm| vm.vm).collect();
            self.vms.retain(|id, _| planned.contains(id));
        }
    }
}

fn running(plan: &VmPlan) -> VmReport {
    VmReport {
        start: plan.start,
        phase: Phase::Running,
        guest_ready: true,
        vmm_pid: Some(1),
        started_at_ms: Some(1_795_000_000_000),
        memory_bytes: Some(64 << 20),
        ..VmReport::pending(plan.vm, plan.epoch)
    }
}

impl SimAgent {
    /// Starts an agent that listens at `socket` and has 64 processors and 1 TiB of memory.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn start(socket: &Path, manner: Manner) -> Result<Self, IpcError> {
        Self::start_with(socket, manner, 1, HostPlan::default())
    }

    /// Starts an agent that kept this plan from an earlier start.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn start_with(
        socket: &Path,
        manner: Manner,
        instance: u64,
        plan: HostPlan,
    ) -> Result<Self, IpcError> {
        let listener = Listener::bind(socket, 0o600)?;
        let capacity =
            Capacity { cpus: 64, memory_mib: 1 << 20, disk_bytes: 1 << 40, disk_free_bytes: 1 << 39 };
        let mut world = World {
            manner,
            instance,
            revision: 1,
            plan,
            vms: BTreeMap::new(),
            blobs: BTreeSet::new(),
            wants_blobs: false,
            capacity,
            logs: BTreeMap::new(),
            plans: 0,
            lease: None,
        };
        world.settle();
        let shared = Arc::new(Shared {
            world: Mutex::new(world),
            changed: Condvar::new(),
            ended: AtomicBool::new(false),
        });
        let server = Arc::clone(&shared);
        let server = std::thread::spawn(move || {
            while let Ok(connection) = listener.accept() {
                if server.ended.load(Ordering::SeqCst) {
                    return;
                }
                let shared = Arc::clone(&server);
                // An answer that cannot be sent has nobody who waits for it.
                std::thread::spawn(move || answer(&shared, &connection).ok());
            }
        });
        Ok(Self { socket: socket.to_owned(), shared, server: Some(server) })
    }

    /// The plan as it was last received.
    pub fn plan(&self) -> HostPlan {
        self.shared.world().plan.clone()
    }

    /// How many plans were received.
    pub fn plans_received(&self) -> usize {
        self.shared.world().plans
    }

    /// Asks for content from now on.
    pub fn want_blobs(&self) {
        self.shared.change(|world| world.wants_blobs = true);
    }

    /// The content that was received.
    pub fn blobs(&self) -> Vec<BlobRef> {
        self.shared.world().blobs.iter().copied().collect()
    }

    /// Until when VMs that may run elsewhere may run, in milliseconds of CLOCK_BOOTTIME; none without leases.
    pub fn lease(&self) -> Option<u64> {
        self.shared.world().lease
    }

    /// Sets the memory of the host in MiB.
    pub fn set_memory(&self, mib: u64) {
        self.shared.change(|world| world.capacity.memory_mib = mib);
    }

    /// Changes how VMs are treated.
    pub fn set_manner(&self, manner: Manner) {
        self.shared.change(|world| world.manner = manner);
    }

    /// Something happens to a VM; answers whether there is such a VM.
    pub fn happen(&self, vm: VmId, change: impl FnOnce(&mut VmReport)) -> bool {
        self.shared.change(|world| world.vms.get_mut(&vm).map(change).is_some())
    }

    /// VMs that are no longer planned are gone now.
    pub fn finish_removals(&self) {
        self.shared.change(|world| {
            let planned: BTreeSet<VmId> = world.plan.vms.iter().map(|vm| vm.vm).collect();
            world.vms.retain(|id, _| planned.contains(id));
        });
    }

    /// Gives a VM this console log, which the caller may go on writing.
    pub fn set_log(&self, vm: VmId, log: File) {
        self.shared.change(|world| world.logs.insert(vm, log));
    }

    /// Waits until a plan fits, and answers it; `None` when none comes in time.
    pub fn wait_for_plan(&self, fits: impl Fn(&HostPlan) -> bool) -> Option<HostPlan> {
        self.wait(|world| fits(&world.plan).then(|| world.plan.clone()))
    }

    /// Waits until this content has arrived; answers whether it did in time.
    pub fn wait_for_blobs(&self, count: usize) -> bool {
        self.wait(|world| (world.blobs.len() >= count).then_some(())).is_some()
    }

    fn wait<T>(&self, ready: impl Fn(&World) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + PATIENCE;
        let mut world = self.shared.world();
        loop {
            if let Some(found) = ready(&world) {
                return Some(found);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            world = self.shared.changed.wait_timeout(world, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for SimAgent {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.shared.change(|_| ());
        // Wakes the server, which sees that it shall end. When it cannot be reached it has ended already.
        Connection::connect(&self.socket).ok();
        if let Some(server) = self.server.take() {
            server.join().ok();
        }
        std::fs::remove_file(&self.socket).ok();
    }
}

fn answer(shared: &Shared, connection: &Connection) -> Result<(), IpcError> {
    while let Some(message) = connection.receive(MESSAGE_BYTES_MAX, None)? {
        let request: Request = message.decode()?;
        let (reply, passed) = reply(shared, request, message.descriptors);
        if shared.ended.load(Ordering::SeqCst) {
            return Ok(());
        }
        let passed: Vec<_> = passed.iter().map(AsFd::as_fd).collect();
        connection.send(&reply, &passed, Instant::now() + PATIENCE)?;
    }
    Ok(())
}

fn refused(kind: ProblemKind, message: &str) -> (Reply, Vec<OwnedFd>) {
    (Reply::Refused(Problem { kind, message: message.into() }), Vec::new())
}

fn reply(shared: &Shared, request: Request, passed: Vec<OwnedFd>) -> (Reply, Vec<OwnedFd>) {
    let plain = |reply| (reply, Vec::new());
    match request {
        Request::Apply(plan) => {
            if plan.generation < shared.world().plan.generation {
                return refused(ProblemKind::Stale, "an older plan than the stored one");
            }
            shared.change(|world| {
                world.plan = plan;
                world.plans += 1;
            });
            plain(Reply::Report(Box::new(shared.world().report())))
        }
        Request::Observe { agent_instance, revision, wait_ms } => {
            let deadline = Instant::now() + Duration::from_millis(wait_ms);
            let mut world = shared.world();
            while world.instance == agent_instance && world.revision <= revision {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() || shared.ended.load(Ordering::SeqCst) {
                    break;
                }
                world = shared.changed.wait_timeout(world, left).unwrap_or_else(PoisonError::into_inner).0;
            }
            plain(Reply::Report(Box::new(world.report())))
        }
        Request::Renew { until_ms, generation } => {
            if shared.world().plan.generation < generation {
                return refused(ProblemKind::NotNow, "the plan here is older");
            }
            shared.change(|world| world.lease = until_ms);
            plain(Reply::Done)
        }
        Request::PutBlob(blob) => {
            let length =
                passed.into_iter().next().map(File::from).and_then(|f| Some(f.metadata().ok()?.size()));
            if length != Some(blob.size_bytes) {
                return refused(ProblemKind::Invalid, "the content has another length");
            }
            shared.change(|world| world.blobs.insert(blob));
            plain(Reply::Done)
        }
        Request::OpenExec { vm } | Request::OpenConsole { vm } => match shared.world().vms.get(&vm) {
            None => refused(ProblemKind::NotFound, "there is no such VM here"),
            Some(vm) if !vm.guest_ready => refused(ProblemKind::NotNow, "the guest is not ready"),
            Some(_) => echo().map_or_else(
                |error| refused(ProblemKind::Host, &error.to_string()),
                |stream| (Reply::Stream, vec![stream]),
            ),
        },
        Request::OpenLog { vm } => match shared.world().logs.get(&vm).map(File::try_clone) {
            None => refused(ProblemKind::NotFound, "there is no such VM here"),
            Some(Err(error)) => refused(ProblemKind::Host, &error.to_string()),
            Some(Ok(log)) => (Reply::Stream, vec![log.into()]),
        },
        Request::Metrics { vm } => match shared.world().vms.contains_key(&vm) {
            false => refused(ProblemKind::NotFound, "there is no such VM here"),
            true => plain(Reply::Metrics(vec![])),
        },
        Request::Doctor => plain(Reply::Findings(vec![Finding {
            check: "simulation".into(),
            state: FindingState::Ok,
            found: "this agent has no host".into(),
            fix: None,
        }])),
    }
}

/// The other end of a stream that repeats what it is told, and says `end` when it has been told all.
fn echo() -> io::Result<OwnedFd> {
    let (mut ours, theirs) = UnixStream::pair()?;
    std::thread::spawn(move || -> io::Result<()> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let count = ours.read(&mut buffer)?;
            if count == 0 {
                return ours.write_all(b"end");
            }
            ours.write_all(buffer.get(..count).unwrap_or_default())?;
        }
    });
    Ok(theirs.into())
}
