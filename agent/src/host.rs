//! The one state that all threads share, and the report made from it.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use blixard_agent_api::report::{Capacity, StepTime};
use blixard_agent_api::{BlobRef, Digest, HostPlan, HostReport, Phase, Run, Start, VmPlan, VmReport};
use blixard_netd_api::{NetdClient, NetworkSpec};
use blixard_vmm_api::control::{Phase as VmmPhase, Status};
use blixard_vmm_api::health::Health;
use blixard_vmm_api::{ExitReason, VmId};
use nix::time::{ClockId, clock_gettime};

use crate::cgroup::CgroupTree;
use crate::config::Config;
use crate::jail::{Program, Said};
use crate::lease::{self, Lease};
use crate::ledger::Ledger;
use crate::record::{Known, Launch};
use crate::steps::{Ending, Found, Step, Wish, steps};
use crate::store::Store;
use crate::vmm_link::{Link, Watch};
use crate::volume::VolumeDriver;

/// Time a guest has when a newer start replaces it, in milliseconds.
const REPLACE_GRACE_MS: u64 = 10_000;
/// Longest time a guest may have, in milliseconds (one day).
const GRACE_MS_MAX: u64 = 86_400_000;
/// Least time between two changes of the health in a report: it comes from inside a guest, and each change is replicated.
const HEALTH_PAUSE: Duration = Duration::from_secs(1);
/// After this time a start that cannot be carried out has failed.
const GIVE_UP: Duration = Duration::from_secs(30);

/// All that the agent's threads work on.
#[derive(Debug)]
pub struct Host {
    /// Where things are.
    pub config: Config,
    /// What survives this process.
    pub ledger: Ledger,
    /// Content.
    pub store: Store,
    /// Volumes.
    pub volumes: Box<dyn VolumeDriver>,
    /// cgroups, or why there are none; `Ok(None)` when a developer asked for none.
    pub cgroups: Result<Option<CgroupTree>, String>,
    /// The VMM's program, or why it cannot be started.
    pub program: Result<Program, String>,
    /// Networks and nics.
    pub netd: NetdClient,
    /// Ends and events of VMMs.
    pub watch: Watch,
    /// Which boot of the host this is.
    pub boot_id: String,
    /// Memory of the host in MiB.
    pub memory_mib: u64,
    core: Mutex<Core>,
    /// Something may have to be done.
    pub wake: Condvar,
    news: Condvar,
    /// The lease is another one.
    pub lease_changed: Condvar,
}

/// The part that changes.
#[derive(Debug, Default)]
pub struct Core {
    /// The stored plan; none before the first.
    pub plan: Option<Arc<HostPlan>>,
    /// Its VMs.
    pub planned: BTreeMap<VmId, Arc<VmPlan>>,
    /// VMs that are planned, known or found.
    pub vms: BTreeMap<VmId, Vm>,
    /// VMs to look at.
    pub dirty: BTreeSet<VmId>,
    /// When to look at a VM again.
    pub timers: BTreeSet<(Instant, VmId)>,
    /// Until when VMs that may be started elsewhere may run; none on a host without leases.
    pub lease: Option<Lease>,
    /// Networks that exist as specified.
    pub networks: BTreeMap<String, NetworkSpec>,
    /// Networks and orphans are to be looked at, at this time.
    pub networks_due: Option<Instant>,
    /// A worker looks at them.
    pub networks_busy: bool,
    /// What is wrong with the host as a whole, by what it is about.
    pub problems: BTreeMap<&'static str, String>,
    instance: u64,
    revision: u64,
}

/// One VM.
#[derive(Debug, Default)]
pub struct Vm {
    /// What the ledger says.
    pub known: Option<Known>,
    /// What is there; what this process holds or computes is filled in by [`Core::view`].
    pub found: Found,
    /// Its VMM.
    pub process: Option<Arc<Vmm>>,
    /// How its VMM ended, until that is recorded: words of the system, what it said last.
    pub outcome: Option<String>,
    /// Control connection.
    pub link: Option<Arc<Link>>,
    /// Newest status of this start.
    pub status: Option<Status>,
    /// The nic's TAP until it is handed over.
    pub tap: Option<OwnedFd>,
    /// The VMM was asked to end.
    pub ending: Option<End>,
    /// A step does not succeed.
    pub failing: Option<Failing>,
    /// Whether its VMM is frozen, since its lease has ended; not known after a restart of the agent.
    pub frozen: Option<bool>,
    /// A worker has it.
    pub busy: bool,
    /// Steps of this start.
    pub times: Vec<StepTime>,
    /// Since when it waits for content, in microseconds of CLOCK_MONOTONIC.
    pub waits_since_us: Option<u64>,
    health: Option<Health>,
    /// When the health changed last.
    health_at: Option<Instant>,
    report: Option<VmReport>,
}

/// A VMM that runs.
#[derive(Debug)]
pub struct Vmm {
    /// Process id.
    pub pid: i32,
    /// Descriptor of the process.
    pub process: OwnedFd,
    /// What it said, when this agent started it.
    pub said: Option<Said>,
}

/// A VMM that shall end.
#[derive(Debug, Clone, Copy)]
pub struct End {
    /// It is killed at this time.
    pub deadline: Instant,
    /// It was killed.
    pub killed: bool,
}

/// A step that does not succeed.
#[derive(Debug, Clone)]
pub struct Failing {
    /// Why.
    pub reason: String,
    /// Since when.
    pub since: Instant,
    /// How often it was tried.
    pub tries: u32,
    /// When it is tried again.
    pub retry_at: Instant,
}

/// Microseconds of CLOCK_MONOTONIC.
pub fn monotonic_us() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}

/// Milliseconds of Unix time.
pub fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// An error with its causes as one sentence.
pub fn sentence(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        text.push_str(": ");
        text.push_str(&part);
        cause = error.source();
    }
    text
}

/// What is needed to make a [`Host`].
#[derive(Debug)]
pub struct Parts {
    /// See [`Host::config`].
    pub config: Config,
    /// See [`Host::ledger`].
    pub ledger: Ledger,
    /// See [`Host::store`].
    pub store: Store,
    /// See [`Host::volumes`].
    pub volumes: Box<dyn VolumeDriver>,
    /// See [`Host::cgroups`].
    pub cgroups: Result<Option<CgroupTree>, String>,
    /// See [`Host::program`].
    pub program: Result<Program, String>,
    /// See [`Host::watch`].
    pub watch: Watch,
    /// See [`Host::boot_id`].
    pub boot_id: String,
    /// See [`Host::memory_mib`].
    pub memory_mib: u64,
    /// A number that no other start of the agent has.
    pub instance: u64,
}

impl Host {
    /// The host before anything was looked at.
    pub fn new(parts: Parts) -> Self {
        let netd = NetdClient::new(parts.config.netd.clone());
        let core = Core { instance: parts.instance, revision: 1, ..Core::default() };
        Self {
            config: parts.config,
            ledger: parts.ledger,
            store: parts.store,
            volumes: parts.volumes,
            cgroups: parts.cgroups,
            program: parts.program,
            netd,
            watch: parts.watch,
            boot_id: parts.boot_id,
            memory_mib: parts.memory_mib,
            core: Mutex::new(core),
            wake: Condvar::new(),
            news: Condvar::new(),
            lease_changed: Condvar::new(),
        }
    }

    /// The state, for a short time: nobody waits for anything while holding it (an append to the ledger does not).
    pub fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until something may have to be done, or until `deadline`.
    pub fn wait_for_work<'a>(
        &self,
        core: MutexGuard<'a, Core>,
        deadline: Option<Instant>,
    ) -> MutexGuard<'a, Core> {
        match deadline {
            None => self.wake.wait(core).unwrap_or_else(PoisonError::into_inner),
            Some(at) => {
                let left = at.saturating_duration_since(Instant::now());
                self.wake.wait_timeout(core, left).unwrap_or_else(PoisonError::into_inner).0
            }
        }
    }

    /// Changes one VM (made when unknown), and tells whoever waits for news or work.
    pub fn change<R>(&self, vm: VmId, change: impl FnOnce(&mut Vm) -> R) -> R {
        let mut core = self.core();
        let answer = change(core.vms.entry(vm).or_default());
        core.dirty.insert(vm);
        self.refresh(&mut core, vm);
        self.wake.notify_one();
        answer
    }

    /// The same for a VM that is still known.
    pub fn change_known<R>(&self, vm: VmId, change: impl FnOnce(&mut Vm) -> R) -> Option<R> {
        let mut core = self.core();
        let answer = change(core.vms.get_mut(&vm)?);
        core.dirty.insert(vm);
        self.refresh(&mut core, vm);
        self.wake.notify_one();
        Some(answer)
    }

    /// Looks at a VM again at this time.
    pub fn look_at(&self, at: Instant, vm: VmId) {
        self.core().timers.insert((at, vm));
        // The loop may wait for a later one.
        self.wake.notify_one();
    }

    /// Makes the report of one VM anew; wakes those who wait for news when it differs.
    pub fn refresh(&self, core: &mut Core, vm: VmId) {
        let planned = core.planned.get(&vm).cloned();
        let instance = core.instance;
        let Some(entry) = core.vms.get_mut(&vm) else { return };
        if let Some(at) = entry.settle_health(Instant::now()) {
            core.timers.insert((at, vm));
        }
        let report = entry.make_report(vm, planned.as_deref(), self);
        if entry.report.as_ref() != Some(&report) {
            entry.report = Some(report);
            core.revision += 1;
            tracing::trace!(%vm, instance, revision = core.revision, "report");
            self.news.notify_all();
        }
    }

    /// Forgets a VM that is neither planned nor known and for which nothing is to be done.
    pub fn forget(&self, core: &mut Core, vm: VmId) {
        let unwanted = core.plan.is_some() && !core.planned.contains_key(&vm);
        let done = |v: &Vm| v.known.is_none() && v.process.is_none() && v.failing.is_none() && !v.busy;
        if unwanted && core.vms.get(&vm).is_some_and(done) {
            core.vms.remove(&vm);
            core.revision += 1;
            self.news.notify_all();
        }
    }

    /// Wakes those who wait for another report.
    pub fn tell_news(&self) {
        self.news.notify_all();
    }

    /// Sets or clears what is wrong with the host as a whole.
    pub fn problem(&self, about: &'static str, problem: Option<String>) {
        let mut core = self.core();
        let before = match problem.clone() {
            Some(text) => core.problems.insert(about, text),
            None => core.problems.remove(about),
        };
        if before != problem {
            if let Some(text) = &problem {
                tracing::warn!(about, "{text}");
            }
            core.revision += 1;
            self.news.notify_all();
        }
    }

    /// Content came or went.
    pub fn content_changed(&self) {
        let mut core = self.core();
        core.revision += 1;
        let all: Vec<VmId> = core.planned.keys().copied().collect();
        core.dirty.extend(all);
        self.news.notify_all();
        self.wake.notify_one();
    }

    /// The report as soon as it is newer than what was seen, or at `deadline`.
    pub fn report_after(&self, instance: u64, revision: u64, deadline: Instant) -> HostReport {
        let mut core = self.core();
        while core.instance == instance && core.revision <= revision {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            core = self.news.wait_timeout(core, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        let mut report = self.report(&core);
        drop(core);
        if let Ok(Some(cgroups)) = &self.cgroups {
            for vm in report.vms.iter_mut().filter(|vm| vm.vmm_pid.is_some()) {
                vm.memory_bytes = cgroups.memory_bytes(vm.vm);
            }
        }
        report
    }

    fn report(&self, core: &Core) -> HostReport {
        let named = core.plan.iter().flat_map(|plan| named(plan));
        let missing: BTreeSet<BlobRef> = named.filter(|blob| !self.store.has(blob)).collect();
        HostReport {
            revision: core.revision,
            agent_instance: core.instance,
            generation: core.plan.as_ref().map(|plan| plan.generation).unwrap_or_default(),
            vms: core.vms.values().filter_map(|vm| vm.report.clone()).collect(),
            missing: missing.into_iter().collect(),
            blobs: self.store.list(),
            capacity: self.capacity(),
            problems: core.problems.values().cloned().collect(),
            leased: core.lease.is_some(),
        }
    }

    fn capacity(&self) -> Capacity {
        let cpus =
            std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
        let disk = nix::sys::statvfs::statvfs(&self.config.state).ok();
        let bytes = |blocks: fn(&nix::sys::statvfs::Statvfs) -> u64| {
            disk.as_ref().map_or(0, |disk| blocks(disk).saturating_mul(disk.fragment_size()))
        };
        Capacity {
            cpus,
            memory_mib: self.memory_mib,
            disk_bytes: bytes(nix::sys::statvfs::Statvfs::blocks),
            disk_free_bytes: bytes(nix::sys::statvfs::Statvfs::blocks_available),
        }
    }

    /// True when a digest is named by the stored plan.
    pub fn names(&self, core: &Core) -> BTreeSet<Digest> {
        core.plan.iter().flat_map(|plan| named(plan)).map(|blob| blob.digest).collect()
    }
}

/// All content that a plan names.
fn named(plan: &HostPlan) -> impl Iterator<Item = BlobRef> + '_ {
    let of_vms = plan.vms.iter().flat_map(|vm| [vm.kernel, vm.initramfs, vm.image]);
    plan.blobs.iter().copied().chain(of_vms)
}

/// What is next for a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// This step.
    Step(Step),
    /// Nothing, until something happens.
    Nothing,
    /// The network of its nic is not there.
    NoNetwork,
}

impl Core {
    /// The report is another one, and VMs are to be looked at.
    pub fn news(&mut self) {
        self.revision += 1;
        let all: Vec<VmId> = self.vms.keys().copied().collect();
        self.dirty.extend(all);
    }

    /// Number of the report and of this start of the agent.
    pub fn instance(&self) -> u64 {
        self.instance
    }

    /// What there is of a VM now.
    pub fn view(&mut self, vm: VmId, host: &Host) -> (Option<Wish>, Found) {
        let plan = self.planned.get(&vm);
        let network =
            plan.and_then(|p| p.nic.as_ref()).is_none_or(|n| self.networks.contains_key(&n.spec.network));
        let Some(entry) = self.vms.get(&vm) else { return (plan.map(|p| Wish::of(p)), Found::default()) };
        let rebooted =
            entry.known.as_ref().and_then(|k| k.launch.as_ref()).is_some_and(|l| l.boot != host.boot_id);
        let ending = match entry.ending {
            None => Ending::NotAsked,
            Some(End { killed: true, .. }) => Ending::Killed,
            Some(End { deadline, .. }) if deadline <= Instant::now() => Ending::Overdue,
            Some(_) => Ending::Asked,
        };
        let found = Found {
            vmm: entry.process.is_some(),
            ending,
            rebooted,
            tap: entry.tap.is_some(),
            content: plan.is_some_and(|p| has_content(p, &host.store)),
            network,
            ..entry.found.clone()
        };
        (plan.map(|p| Wish::of(p)), found)
    }

    /// What is next for a VM at this moment.
    pub fn next(&mut self, vm: VmId, host: &Host) -> Next {
        // Without a plan nobody has said what shall not be here.
        if self.plan.is_none() {
            return Next::Nothing;
        }
        let (wish, found) = self.view(vm, host);
        let Some(entry) = self.vms.get_mut(&vm) else { return Next::Nothing };
        let steps = steps(wish, entry.known.as_ref(), &found);
        let wants_start = wish.is_some_and(|w| {
            let known = entry.known.as_ref();
            w.run && !found.vmm && known.is_some_and(|k| k.begun_start() == w.start && k.end.is_none())
        });
        entry.note_waiting(wants_start && !found.content);
        if entry.failing.as_ref().is_some_and(|failing| failing.retry_at > Instant::now()) {
            return Next::Nothing;
        }
        // What may run elsewhere begins no start without a lease; a renewal looks at all VMs again.
        let leased = self
            .planned
            .get(&vm)
            .is_none_or(|plan| lease::allows(self.lease.as_ref(), lease::boottime_ms(), plan));
        let first = steps.into_iter().next();
        match first {
            Some(Step::Begin(_) | Step::Launch) if !leased => {
                // That is nothing that has failed: the start goes on with the next lease.
                entry.failing = None;
                Next::Nothing
            }
            Some(step) => Next::Step(step),
            None if wants_start && found.content && !found.network => Next::NoNetwork,
            None => {
                entry.failing = None;
                Next::Nothing
            }
        }
    }

    /// Puts a plan in place of the stored one.
    pub fn set_plan(&mut self, plan: HostPlan) {
        let before = std::mem::take(&mut self.planned);
        self.planned = plan.vms.iter().map(|vm| (vm.vm, Arc::new(vm.clone()))).collect();
        let changed =
            self.planned.iter().filter(|(vm, plan)| before.get(vm) != Some(plan)).map(|(vm, _)| *vm);
        let dropped = before.keys().filter(|vm| !self.planned.contains_key(vm)).copied();
        let look: Vec<VmId> = changed.chain(dropped).chain(self.vms.keys().copied()).collect();
        for vm in look {
            let entry = self.vms.entry(vm).or_default();
            let same = before.get(&vm) == self.planned.get(&vm);
            if let Some(failing) = entry.failing.as_mut().filter(|_| !same) {
                failing.retry_at = Instant::now();
            }
            self.dirty.insert(vm);
        }
        let networks: BTreeMap<_, _> = plan.networks.iter().map(|n| (n.name.clone(), n.clone())).collect();
        if networks != self.networks {
            self.networks.retain(|name, spec| networks.get(name) == Some(spec));
            self.networks_due = Some(Instant::now());
        }
        self.plan = Some(Arc::new(plan));
        self.revision += 1;
    }
}

fn has_content(plan: &VmPlan, store: &Store) -> bool {
    [&plan.kernel, &plan.initramfs, &plan.image].into_iter().all(|blob| store.has(blob))
}

/// How long to wait before the next try: 100 ms, doubled each time, at most 5 s.
fn pause(tries: u32) -> Duration {
    Duration::from_millis(100u64.saturating_mul(1 << tries.min(6))).min(Duration::from_secs(5))
}

impl Vm {
    /// Notes that a step failed. True when it has failed for so long that the start is given up.
    pub fn failed(&mut self, reason: String) -> bool {
        let now = Instant::now();
        let (since, tries) = self.failing.as_ref().map_or((now, 0), |f| (f.since, f.tries.saturating_add(1)));
        self.failing = Some(Failing { reason, since, tries, retry_at: now + pause(tries) });
        now.saturating_duration_since(since) > GIVE_UP
    }

    fn note_waiting(&mut self, waits: bool) {
        if waits {
            self.waits_since_us.get_or_insert_with(monotonic_us);
        } else if let Some(begin_us) = self.waits_since_us.take() {
            self.times.push(StepTime { step: "blobs".into(), begin_us, end_us: monotonic_us() });
        }
    }

    /// How long the guest has to end, by its plan.
    pub fn grace(plan: Option<&VmPlan>) -> Duration {
        let ms = match plan.map(|p| p.run) {
            Some(Run::Stopped { grace_ms }) => grace_ms.min(GRACE_MS_MAX),
            _ => REPLACE_GRACE_MS,
        };
        Duration::from_millis(ms)
    }

    /// Takes over the health that the guest told last; answers when that is possible, if it is not yet.
    fn settle_health(&mut self, now: Instant) -> Option<Instant> {
        let newest =
            self.status.as_ref().filter(|_| self.process.is_some()).and_then(|status| status.health.as_ref());
        let Some(newest) = newest else {
            self.health = None;
            return None;
        };
        if self.health.as_ref() == Some(newest) {
            return None;
        }
        let possible = self.health_at.map_or(now, |at| at + HEALTH_PAUSE);
        if possible > now {
            return Some(possible);
        }
        self.health = Some(newest.clone());
        self.health_at = Some(now);
        None
    }

    fn make_report(&self, vm: VmId, plan: Option<&VmPlan>, host: &Host) -> VmReport {
        let known = self.known.as_ref();
        let start = known.map_or(Start(0), Known::begun_start);
        let end = known.and_then(|k| k.end.as_ref());
        let status = self.status.as_ref();
        let (phase, reason) = self.phase(plan, host);
        VmReport {
            vm,
            epoch: known.map(|k| k.epoch).or(plan.map(|p| p.epoch)).unwrap_or_default(),
            start,
            phase,
            reason,
            guest_ready: end.map_or(status.is_some_and(|s| s.guest_ready), |end| end.guest_ready),
            vmm_pid: self.process.as_ref().map(|p| p.pid),
            started_at_ms: known.and_then(|k| k.begun).map(|(_, at)| at),
            ended_at_ms: end.map(|end| end.at_ms),
            exit: end.and_then(|end| end.exit.clone()),
            workload: end.map_or(status.and_then(|s| s.workload), |end| end.workload),
            health: self.health.clone(),
            boot: end.map(|end| end.boot).or(status.map(|s| s.times)).unwrap_or_default(),
            steps: self.times.clone(),
            memory_bytes: None,
            refused: end.is_some_and(|end| end.refused),
        }
    }

    fn phase(&self, plan: Option<&VmPlan>, host: &Host) -> (Phase, Option<String>) {
        let why = self.failing.as_ref().map(|f| f.reason.clone());
        let Some(plan) = plan else {
            return (Phase::Stopping, Some(why.unwrap_or_else(|| "it is being removed".into())));
        };
        let Some(known) = &self.known else { return (Phase::Pending, why) };
        if plan.epoch < known.epoch {
            return (
                Phase::Pending,
                Some(format!("placement {} is older than {}", plan.epoch.0, known.epoch.0)),
            );
        }
        if self.process.is_some() {
            let of = known.launch.as_ref().map(|l| l.start);
            if self.ending.is_some() || plan.run != Run::Running || of < Some(plan.start) {
                return (Phase::Stopping, why);
            }
            let told = self.status.as_ref().and_then(|s| s.guest_problem.clone());
            if self.frozen == Some(true) {
                return (Phase::Paused, Some("it is frozen: the lease of its host has ended".into()));
            }
            return match &self.status {
                Some(status) if status.phase == VmmPhase::Paused => (Phase::Paused, told),
                Some(status) if status.guest_ready => (Phase::Running, told),
                _ => (Phase::Starting, told.or(why)),
            };
        }
        let unrecorded = |l: &Launch| l.process.is_some() && known.ended_start() < Some(l.start);
        if known.launch.as_ref().is_some_and(unrecorded) {
            return (Phase::Stopping, Some("its VMM has ended".into()));
        }
        let over = known.ended_start() == Some(known.begun_start());
        let new = plan.run == Run::Running && plan.start > known.begun_start();
        if let Some(end) = known.end.as_ref().filter(|_| over && !new) {
            let phase = if end.fault.is_some() { Phase::Failed } else { Phase::Stopped };
            return (phase, end.fault.clone().or(end.exit.as_ref().map(ExitReason::to_string)));
        }
        if plan.run != Run::Running || plan.start == Start(0) {
            return (Phase::Stopped, why);
        }
        let waits = (!has_content(plan, &host.store)).then(|| "it waits for its image or kernel".to_owned());
        (Phase::Preparing, why.or(waits))
    }
}

#[cfg(test)]
mod tests {
    use blixard_vmm_api::health::HealthState;

    use super::*;

    #[test]
    fn a_guest_whose_health_flutters_changes_the_report_once_a_second() {
        let (_reader, writer) = std::io::pipe().unwrap();
        let vmm = Vmm { pid: 1, process: writer.into(), said: None };
        let mut vm = Vm { process: Some(Arc::new(vmm)), ..Vm::default() };
        let begin = Instant::now();
        let mut changes = 0;
        for ms in 0..3000_u64 {
            let state = if ms % 2 == 0 { HealthState::Healthy } else { HealthState::Unhealthy };
            let health = Health { state, output: String::new() };
            let status = r#"{"vm":"01ARZ3NDEKTSV4RRFFQ69G5FAV","phase":"running"}"#;
            vm.status = Some(Status { health: Some(health), ..serde_json::from_str(status).unwrap() });
            let before = vm.health.clone();
            let now = begin + Duration::from_millis(ms);
            let later = vm.settle_health(now);
            assert_eq!(later.is_none(), vm.health == vm.status.as_ref().unwrap().health, "what waits is due");
            assert!(later.is_none_or(|at| at > now && at <= now + HEALTH_PAUSE));
            changes += usize::from(vm.health != before);
        }
        assert!((2..=4).contains(&changes), "{changes}");
        vm.process = None;
        assert_eq!((vm.settle_health(begin), vm.health), (None, None), "what does not run has none");
    }
}
