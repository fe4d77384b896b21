//! A simulated host and its agent: VMs are entries in a table that start, stop and freeze after some time. The agent keeps the rules
//! of the real one (`agent/src/lease.rs`): its plan and that it has leases are durable, at the end of a lease it freezes what may
//! run elsewhere and starts nothing, it thaws what is still planned.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blixard_agent_api::plan::OnLeaseEnd;
use blixard_agent_api::report::Capacity;
use blixard_agent_api::{
    AgentError, BlobRef, Finding, Generation, HostPlan, HostReport, Phase, Problem, ProblemKind, Run, Start,
    VmPlan, VmReport,
};
use blixard_node::host::{Agent, Asked};
use blixard_node::state::NodeId;
use blixard_node::watch;
use blixard_vmm_api::guest::WorkloadExit;
use blixard_vmm_api::health::{Health, HealthState};
use blixard_vmm_api::stats::Sample;
use blixard_vmm_api::{ExitReason, VmId};
use futures::FutureExt;
use tokio::time::Instant;

use crate::census::Census;
use crate::clock::HostClock;
use crate::dice::Dice;
use crate::trace::Trace;

/// Between two looks of the agent.
const LOOK: Duration = Duration::from_millis(20);
/// Longest time that freezing takes: the cluster allows 250 ms, with the time between two looks.
const FREEZE_MS_MAX: u64 = 100;

/// What a host has for VMs.
pub const CAPACITY: Capacity =
    Capacity { cpus: 8, memory_mib: 4096, disk_bytes: 64 << 30, disk_free_bytes: 32 << 30 };

/// What is under way with a VM, and when it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    None,
    Starting(Instant),
    Stopping(Instant),
    /// It goes, with all that it has.
    Removing(Instant),
    Freezing(Instant),
}

#[derive(Debug, Clone)]
struct Vm {
    report: VmReport,
    freezes: bool,
    /// It has a process.
    process: bool,
    frozen: bool,
    /// In this start its checks do not succeed.
    ill: bool,
    work: Work,
}

#[derive(Debug)]
struct Table {
    dice: Dice,
    instance: u64,
    revision: u64,
    /// Durable.
    plan: HostPlan,
    /// Durable: it has leases.
    marked: bool,
    /// Until when, in milliseconds of CLOCK_BOOTTIME; kept until the next boot.
    lease: Option<u64>,
    vms: BTreeMap<VmId, Vm>,
    agent_runs: bool,
    powered: bool,
    /// Of a hundred thousand looks at a VM, in how many it ends by itself, and in how many it becomes unhealthy.
    ends_by_itself: u64,
    becomes_ill: u64,
}

/// A host.
#[derive(Debug)]
pub struct Host {
    /// The node on it.
    pub node: NodeId,
    /// Its clocks.
    pub clock: Arc<HostClock>,
    table: Mutex<Table>,
    changed: watch::Sender<u64>,
    census: Census,
    trace: Trace,
}

impl Host {
    /// A host with an agent that knows nothing yet.
    pub fn new(
        node: NodeId,
        clock: Arc<HostClock>,
        mut dice: Dice,
        census: Census,
        trace: Trace,
    ) -> Arc<Self> {
        let table = Table {
            instance: dice.next() >> 1,
            dice,
            revision: 1,
            plan: HostPlan::default(),
            marked: false,
            lease: None,
            vms: BTreeMap::new(),
            agent_runs: true,
            powered: true,
            ends_by_itself: 2,
            becomes_ill: 10,
        };
        let host =
            Self { node, clock, table: Mutex::new(table), changed: watch::Sender::new(1), census, trace };
        let host = Arc::new(host);
        tokio::spawn(Arc::clone(&host).run());
        host
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the agent of this host is to one run of the node.
    pub fn link(self: &Arc<Self>, alive: Arc<AtomicBool>) -> Arc<dyn Agent> {
        Arc::new(Link { host: Arc::clone(self), alive })
    }

    /// The agent ends; its VMs run on.
    pub fn end_agent(&self) {
        self.table().agent_runs = false;
        self.changed.send_modify(|revision| *revision += 1);
    }

    /// The agent is started again, if its host has power and nothing else did so.
    pub fn restart_agent(&self) {
        let table = self.table();
        let due = table.powered && !table.agent_runs;
        drop(table);
        if due {
            self.trace.note(format_args!("the agent of {} is back", self.node));
            self.begin_agent();
        }
    }

    /// The agent runs again, with what it had stored.
    fn begin_agent(&self) {
        let mut table = self.table();
        table.instance = table.dice.next() >> 1;
        table.revision = 1;
        table.agent_runs = true;
        drop(table);
        self.changed.send_modify(|revision| *revision += 1);
    }

    /// The power fails: nothing runs any more.
    pub fn lose_power(&self) {
        let mut table = self.table();
        table.powered = false;
        table.agent_runs = false;
        let known: Vec<VmId> = table.vms.keys().copied().collect();
        // What was begun is durable: no start runs twice.
        for vm in table.vms.values_mut() {
            if vm.process || matches!(vm.work, Work::Starting(_)) {
                vm.report.phase = Phase::Failed;
                vm.report.exit = Some(ExitReason::Killed);
                vm.report.guest_ready = false;
            }
            (vm.process, vm.frozen, vm.work) = (false, false, Work::None);
        }
        drop(table);
        known.into_iter().for_each(|vm| self.census.ended(vm, self.node));
        self.changed.send_modify(|revision| *revision += 1);
    }

    /// The host boots. A host with leases has none then until its node renews it.
    pub fn boot(&self) {
        self.clock.boot();
        let mut table = self.table();
        table.powered = true;
        table.lease = table.marked.then_some(0);
        drop(table);
        self.begin_agent();
    }

    /// Nothing ends by itself any more, and all become healthy.
    pub fn calm(&self) {
        let mut table = self.table();
        (table.ends_by_itself, table.becomes_ill) = (0, 0);
    }

    /// What runs here now, unfrozen: VM and epoch.
    pub fn running(&self) -> Vec<(VmId, u64)> {
        let table = self.table();
        let runs = table.vms.iter().filter(|(_, vm)| vm.process && !vm.frozen);
        runs.map(|(id, vm)| (*id, vm.report.epoch.0)).collect()
    }

    /// All VMs that are known here.
    pub fn known(&self) -> Vec<VmId> {
        self.table().vms.keys().copied().collect()
    }

    async fn run(self: Arc<Self>) {
        loop {
            tokio::time::sleep(LOOK).await;
            let mut table = self.table();
            if !table.agent_runs {
                continue;
            }
            if self.look(&mut table) {
                table.revision += 1;
                drop(table);
                self.changed.send_modify(|revision| *revision += 1);
            }
        }
    }

    /// One look at everything; answers whether there is news.
    fn look(&self, table: &mut Table) -> bool {
        let boottime_ms = self.clock.boottime_ms();
        let over = table.lease.is_some_and(|until_ms| until_ms <= boottime_ms);
        let planned: BTreeMap<VmId, VmPlan> =
            table.plan.vms.iter().map(|plan| (plan.vm, plan.clone())).collect();
        for plan in &table.plan.vms {
            table.vms.entry(plan.vm).or_insert_with(|| Vm {
                report: VmReport::pending(plan.vm, plan.epoch),
                freezes: plan.on_lease_end == OnLeaseEnd::Freeze,
                process: false,
                frozen: false,
                ill: false,
                work: Work::None,
            });
        }
        let now = Instant::now();
        let mut news = false;
        let Table { vms, dice, ends_by_itself, becomes_ill, .. } = table;
        let mut gone = Vec::new();
        for (id, vm) in vms.iter_mut() {
            let before = vm.report.clone();
            let plan = planned.get(id);
            self.done(*id, vm, over, now);
            if vm.work == Work::None {
                self.act(*id, vm, plan, over, dice, now);
            }
            if vm.process && !vm.frozen && dice.next() % 100_000 < *ends_by_itself {
                self.end(*id, vm, Some(WorkloadExit::Code(1)));
            }
            if vm.process && !vm.frozen && plan.is_some_and(|plan| plan.health.is_some()) {
                self.check_health(*id, vm, dice, *becomes_ill);
            }
            if matches!(vm.work, Work::Removing(at) if at <= now) {
                gone.push(*id);
            }
            news |= vm.report != before;
        }
        for id in gone {
            vms.remove(&id);
            self.census.ended(id, self.node);
            news = true;
        }
        news
    }

    /// A check of a VM's health, now and then.
    fn check_health(&self, id: VmId, vm: &mut Vm, dice: &mut Dice, becomes_ill: u64) {
        let chance = dice.next() % 100_000;
        let state = vm.report.health.as_ref().map(|health| health.state);
        let ill = vm.ill && becomes_ill > 0;
        let next = match state {
            None => HealthState::Starting,
            Some(HealthState::Starting) if chance < 5_000 && ill => HealthState::Unhealthy,
            Some(HealthState::Starting) if chance < 10_000 && !ill => HealthState::Healthy,
            Some(HealthState::Healthy) if chance < becomes_ill => HealthState::Unhealthy,
            Some(HealthState::Unhealthy) if chance < 1_000 && !ill => HealthState::Healthy,
            Some(same) => same,
        };
        if Some(next) != state {
            self.trace.note(format_args!("{}: {id} is {next}", self.node));
        }
        vm.report.health = Some(Health { state: next, output: String::new() });
    }

    /// What was under way is done.
    fn done(&self, id: VmId, vm: &mut Vm, over: bool, now: Instant) {
        match vm.work {
            // Begun in time and too late now: it begins anew when there is a lease.
            Work::Starting(at) if at <= now && over && vm.freezes => {
                vm.work = Work::None;
                vm.report.start = Start(0);
                vm.report.phase = Phase::Pending;
            }
            Work::Starting(at) if at <= now => {
                vm.work = Work::None;
                vm.process = true;
                vm.frozen = false;
                vm.report.phase = Phase::Running;
                vm.report.guest_ready = true;
                self.census.runs(id, vm.report.epoch.0, self.node);
            }
            Work::Stopping(at) if at <= now => {
                vm.work = Work::None;
                self.end(id, vm, None);
            }
            Work::Freezing(at) if at <= now => {
                vm.work = Work::None;
                vm.frozen = true;
                self.trace.note(format_args!("{} freezes {id}", self.node));
                self.census.ended(id, self.node);
            }
            _ => {}
        }
    }

    fn end(&self, id: VmId, vm: &mut Vm, workload: Option<WorkloadExit>) {
        let now_ms = blixard_node::clock::Clock::new(Arc::clone(&self.clock) as _).now_ms();
        vm.process = false;
        vm.frozen = false;
        vm.report.phase = if workload.is_some() { Phase::Failed } else { Phase::Stopped };
        vm.report.guest_ready = false;
        vm.report.exit = Some(ExitReason::PowerOff);
        vm.report.ended_at_ms = Some(now_ms);
        vm.report.workload = workload;
        self.census.ended(id, self.node);
    }

    /// The next thing to do about a VM.
    fn act(&self, id: VmId, vm: &mut Vm, plan: Option<&VmPlan>, over: bool, dice: &mut Dice, now: Instant) {
        let Some(plan) = plan else {
            // It is killed as it is, frozen or not.
            vm.work = Work::Removing(now + dice.millis(5..=150));
            return;
        };
        vm.freezes = plan.on_lease_end == OnLeaseEnd::Freeze;
        let allowed = !(over && vm.freezes);
        if vm.process && !vm.frozen && !allowed {
            vm.work = Work::Freezing(now + dice.millis(0..=FREEZE_MS_MAX));
            return;
        }
        let current = vm.report.start == plan.start;
        if vm.process && !current {
            vm.work = Work::Stopping(now + dice.millis(5..=100));
            return;
        }
        if vm.frozen && allowed && current {
            vm.frozen = false;
            self.trace.note(format_args!("{} thaws {id}", self.node));
            self.census.runs(id, vm.report.epoch.0, self.node);
        }
        match plan.run {
            Run::Running if !current && allowed => {
                vm.report = VmReport {
                    start: plan.start,
                    phase: Phase::Starting,
                    started_at_ms: Some(1),
                    ..VmReport::pending(plan.vm, plan.epoch)
                };
                vm.ill = plan.health.is_some() && dice.chance(200);
                vm.work = Work::Starting(now + dice.millis(20..=400));
            }
            Run::Stopped { .. } if vm.process => {
                vm.report.phase = Phase::Stopping;
                vm.work = Work::Stopping(now + dice.millis(5..=300));
            }
            Run::Stopped { .. } => {
                vm.report.phase = Phase::Stopped;
                vm.report.epoch = plan.epoch;
            }
            Run::Running => {}
        }
    }

    fn report(&self, table: &Table) -> HostReport {
        HostReport {
            revision: table.revision,
            agent_instance: table.instance,
            generation: table.plan.generation,
            vms: table.vms.values().map(|vm| vm.report.clone()).collect(),
            missing: Vec::new(),
            blobs: Vec::new(),
            capacity: CAPACITY,
            problems: Vec::new(),
            leased: table.lease.is_some(),
        }
    }

    fn apply(&self, plan: HostPlan) -> Result<HostReport, AgentError> {
        let mut table = self.table();
        if plan.generation < table.plan.generation {
            return Err(refused(ProblemKind::Stale, "an older plan than the stored one"));
        }
        if plan.generation == table.plan.generation && plan != table.plan {
            self.trace
                .wrong(format_args!("{} gets another plan of generation {}", self.node, plan.generation));
        }
        self.trace.note(format_args!("{} has plan {} of {} VMs", self.node, plan.generation, plan.vms.len()));
        table.plan = plan;
        table.revision += 1;
        let report = self.report(&table);
        drop(table);
        self.changed.send_modify(|revision| *revision += 1);
        Ok(report)
    }

    fn renew(&self, until_ms: Option<u64>, generation: Generation) -> Result<(), AgentError> {
        let mut table = self.table();
        if table.plan.generation < generation {
            return Err(refused(ProblemKind::NotNow, "the plan here is older"));
        }
        self.trace.note(format_args!("{} has a lease until {until_ms:?}", self.node));
        table.lease = until_ms.map(|until_ms| until_ms.max(table.lease.unwrap_or(0)));
        let news = table.marked != until_ms.is_some();
        table.marked = until_ms.is_some();
        if news {
            table.revision += 1;
            drop(table);
            self.changed.send_modify(|revision| *revision += 1);
        }
        Ok(())
    }
}

fn refused(kind: ProblemKind, message: &str) -> AgentError {
    AgentError::Refused(Problem { kind, message: message.into() })
}

/// The agent, as one run of the node sees it.
struct Link {
    host: Arc<Host>,
    alive: Arc<AtomicBool>,
}

impl Link {
    /// Asks after a moment, when both ends are still there.
    fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Host) -> Result<T, AgentError> + Send + 'static,
    ) -> Asked<T> {
        let (host, alive) = (Arc::clone(&self.host), Arc::clone(&self.alive));
        async move {
            let time = host.table().dice.millis(0..=3);
            tokio::time::sleep(time).await;
            if !alive.load(Ordering::SeqCst) || !host.table().agent_runs {
                return Err(AgentError::Confused);
            }
            question(&host)
        }
        .boxed()
    }
}

impl Agent for Link {
    fn apply(&self, plan: HostPlan) -> Asked<HostReport> {
        self.ask(move |host| host.apply(plan))
    }

    fn observe(&self, agent_instance: u64, revision: u64, wait_ms: u64) -> Asked<HostReport> {
        let (host, alive) = (Arc::clone(&self.host), Arc::clone(&self.alive));
        let first = self.ask(|_| Ok(()));
        async move {
            first.await?;
            let until = Instant::now() + Duration::from_millis(wait_ms);
            let mut changes = host.changed.subscribe();
            loop {
                changes.mark_unchanged();
                {
                    let table = host.table();
                    if !alive.load(Ordering::SeqCst) || !table.agent_runs {
                        return Err(AgentError::Confused);
                    }
                    let old = table.instance == agent_instance && table.revision <= revision;
                    if !old || Instant::now() >= until {
                        return Ok(host.report(&table));
                    }
                }
                // Over or changed: looked at again.
                tokio::time::timeout_at(until, changes.changed()).await.ok();
            }
        }
        .boxed()
    }

    fn renew(&self, until_ms: Option<u64>, generation: Generation) -> Asked<()> {
        self.ask(move |host| host.renew(until_ms, generation))
    }

    fn put_blob(&self, _: BlobRef, _: &File) -> Result<(), AgentError> {
        Err(AgentError::Confused)
    }

    fn open_exec(&self, _: VmId) -> Result<OwnedFd, AgentError> {
        Err(AgentError::Confused)
    }

    fn open_console(&self, _: VmId) -> Result<OwnedFd, AgentError> {
        Err(AgentError::Confused)
    }

    fn open_log(&self, _: VmId) -> Result<OwnedFd, AgentError> {
        Err(AgentError::Confused)
    }

    fn metrics(&self, _: VmId) -> Result<Vec<Sample>, AgentError> {
        Err(AgentError::Confused)
    }

    fn doctor(&self) -> Result<Vec<Finding>, AgentError> {
        Err(AgentError::Confused)
    }
}
