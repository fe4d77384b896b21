//! The loop: woken by a plan, the end or an event of a VMM, content that arrived, or a timer. It takes no input but the
//! state. VMs with something to do go to a few workers, so that many VMs start at the same time; a VM is with one worker
//! at most.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use blixard_agent_api::VmPlan;
use blixard_netd_api::{NetworkSpec, NicId, NicSpec};
use blixard_vmm_api::VmId;

use crate::execute;
use crate::host::{Host, Next, sentence};
use crate::steps::Step;
use crate::vmm_link;

/// How often networks, nics and unnamed content are looked at when nothing happens.
const LOOK_AGAIN: Duration = Duration::from_secs(60);
/// How soon after a failure of netd.
const LOOK_SOON: Duration = Duration::from_secs(1);

#[derive(Debug)]
enum Job {
    Vm(VmId),
    Networks,
}

#[derive(Debug, Default)]
struct Queue {
    jobs: Mutex<VecDeque<Job>>,
    come: Condvar,
}

impl Queue {
    fn push(&self, job: Job) {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner).push_back(job);
        self.come.notify_one();
    }

    fn pop(&self) -> Job {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match jobs.pop_front() {
                Some(job) => return job,
                None => jobs = self.come.wait(jobs).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// Starts the workers and runs the loop for as long as the agent lives.
///
/// # Errors
/// A thread cannot be started.
pub fn run(host: &Arc<Host>) -> std::io::Result<()> {
    let queue = Arc::new(Queue::default());
    let workers = thread::available_parallelism().map_or(1, usize::from).saturating_mul(2).clamp(4, 32);
    for number in 0..workers {
        let (host, queue) = (Arc::clone(host), Arc::clone(&queue));
        thread::Builder::new().name(format!("worker-{number}")).spawn(move || {
            loop {
                match queue.pop() {
                    Job::Vm(vm) => work(&host, vm),
                    Job::Networks => networks(&host),
                }
            }
        })?;
    }
    host.core().networks_due = Some(Instant::now());
    dispatch(host, &queue)
}

fn dispatch(host: &Arc<Host>, queue: &Queue) -> ! {
    let mut core = host.core();
    loop {
        let now = Instant::now();
        while core.timers.first().is_some_and(|(at, _)| *at <= now) {
            let due = core.timers.pop_first();
            core.dirty.extend(due.map(|(_, vm)| vm));
        }
        if !core.networks_busy && core.networks_due.is_some_and(|at| at <= now) {
            // The job sets the next time. One at a time: an older plan must not undo what a newer one made.
            core.networks_due = None;
            core.networks_busy = true;
            queue.push(Job::Networks);
        }
        if host.ledger.is_long() {
            let known: BTreeMap<_, _> =
                core.vms.iter().filter_map(|(vm, v)| v.known.clone().map(|k| (*vm, k))).collect();
            if let Err(error) = host.ledger.rewrite(&known) {
                tracing::warn!(error = sentence(&error), "cannot shorten the ledger");
            }
        }
        for vm in std::mem::take(&mut core.dirty) {
            let lost_link = core.vms.get(&vm).is_some_and(|v| v.process.is_some() && v.link.is_none());
            let next = core.next(vm, host);
            let Some(entry) = core.vms.get_mut(&vm) else { continue };
            if !entry.busy && (next != Next::Nothing || lost_link) {
                entry.busy = true;
                queue.push(Job::Vm(vm));
            }
            host.refresh(&mut core, vm);
            host.forget(&mut core, vm);
        }
        let timer = core.timers.first().map(|(at, _)| *at);
        let networks = core.networks_due.filter(|_| !core.networks_busy);
        let deadline = timer.into_iter().chain(networks).min();
        core = host.wait_for_work(core, deadline);
    }
}

/// Does what is to be done for one VM, step by step, until there is nothing or a step fails.
fn work(host: &Host, vm: VmId) {
    let lost_link = host.core().vms.get(&vm).is_some_and(|v| v.process.is_some() && v.link.is_none());
    if lost_link {
        vmm_link::reconnect(host, vm);
    }
    loop {
        let next = {
            let mut core = host.core();
            let next = core.next(vm, host);
            if next == Next::Nothing {
                // In the same moment: what changes after this finds the VM idle.
                if let Some(entry) = core.vms.get_mut(&vm) {
                    entry.busy = false;
                }
                host.refresh(&mut core, vm);
                host.forget(&mut core, vm);
                return;
            }
            next
        };
        let result = match next {
            Next::Step(step) => execute::step(host, vm, &step).map_err(|failure| (step, failure)),
            Next::NoNetwork => {
                let problem = host.core().problems.get("netd").cloned();
                let reason = problem.unwrap_or_else(|| "the network of its nic is not there".into());
                let failure = execute::Failure::of(reason, false);
                Err((Step::OpenNic, failure))
            }
            Next::Nothing => continue,
        };
        if let Err((step, failure)) = result {
            take_failure(host, vm, &step, failure);
        }
    }
}

/// Notes that a step failed: it is tried again, or its start has failed.
fn take_failure(host: &Host, vm: VmId, step: &Step, failure: execute::Failure) {
    tracing::warn!(%vm, ?step, reason = failure.reason, lasting = failure.lasting, "step failed");
    let of_start = matches!(
        step,
        Step::Admit
            | Step::Begin(_)
            | Step::MakeVolume
            | Step::MakeFolders
            | Step::OpenNic
            | Step::MakeCgroup
            | Step::Launch
    );
    let given_up = host.change(vm, |entry| entry.failed(failure.reason.clone()));
    let admitted = host.core().vms.get(&vm).is_some_and(|v| v.known.is_some());
    if of_start && admitted && (failure.lasting || given_up) {
        // When not even that can be recorded the step is tried again.
        if execute::fail(host, vm, failure.reason, failure.refuses).is_ok() {
            return;
        }
    }
    let retry = host.core().vms.get(&vm).and_then(|v| v.failing.as_ref().map(|f| f.retry_at));
    if let Some(at) = retry {
        host.look_at(at, vm);
    }
}

/// Makes networks as planned, repairs nics, removes what belongs to nobody, and lets unnamed content go.
fn networks(host: &Host) {
    let result = look_at_networks(host);
    let soon = match &result {
        Ok(()) => LOOK_AGAIN,
        Err(_) => LOOK_SOON,
    };
    host.problem("netd", result.err());
    let named = {
        let mut core = host.core();
        let due = core.networks_due.unwrap_or_else(|| Instant::now() + soon);
        core.networks_due = Some(due);
        core.networks_busy = false;
        let all: Vec<VmId> = core.vms.keys().copied().collect();
        core.dirty.extend(all);
        host.wake.notify_one();
        core.plan.is_some().then(|| host.names(&core))
    };
    if let Some(named) = named
        && host.store.clean(|digest| named.contains(digest), Instant::now())
    {
        host.content_changed();
    }
}

fn look_at_networks(host: &Host) -> Result<(), String> {
    let Some(plan) = host.core().plan.clone() else { return Ok(()) };
    // Without networks and nics there is nothing to ask netd for: a host may have none.
    let idle = {
        let core = host.core();
        plan.networks.is_empty() && core.networks.is_empty() && !core.vms.values().any(|v| v.found.nic)
    };
    if idle && !host.config.netd.exists() {
        return Ok(());
    }
    let mut first: Result<(), String> = Ok(());
    let mut note = |result: Result<(), blixard_netd_api::NetdError>| {
        if let Err(error) = &result
            && first.is_ok()
        {
            first = Err(sentence(error));
        }
        result.is_ok()
    };
    for network in &plan.networks {
        if note(host.netd.ensure_network(network)) {
            ensured(host, network);
        }
    }
    let inventory = match host.netd.list() {
        Ok(inventory) => inventory,
        Err(error) => return first.and(Err(sentence(&error))),
    };
    let there: BTreeSet<NicId> = inventory.nics.iter().map(|(id, _)| id.clone()).collect();
    let (ours, lost) = nics(host, &there);
    for id in there.difference(&ours) {
        tracing::info!(nic = %id, "removing a nic that belongs to no VM");
        note(host.netd.remove_nic(id));
    }
    for spec in lost {
        note(host.netd.ensure_nic(&spec));
    }
    for name in inventory.networks {
        if !plan.networks.iter().any(|network| network.name == name) {
            note(host.netd.remove_network(&name));
        }
    }
    first
}

fn ensured(host: &Host, network: &NetworkSpec) {
    let mut core = host.core();
    let planned = core.plan.as_ref().is_some_and(|plan| plan.networks.contains(network));
    if !planned {
        return;
    }
    core.networks.insert(network.name.clone(), network.clone());
    let on_it = |plan: &VmPlan| plan.nic.as_ref().is_some_and(|nic| nic.spec.network == network.name);
    let waiting: Vec<VmId> = core.planned.iter().filter(|(_, plan)| on_it(plan)).map(|(vm, _)| *vm).collect();
    for vm in waiting {
        if let Some(failing) = core.vms.get_mut(&vm).and_then(|entry| entry.failing.as_mut()) {
            failing.retry_at = Instant::now();
        }
        core.dirty.insert(vm);
    }
    host.wake.notify_one();
}

/// Nics of VMs that are here, and those of running VMs that are not among `there`.
fn nics(host: &Host, there: &BTreeSet<NicId>) -> (BTreeSet<NicId>, Vec<NicSpec>) {
    let core = host.core();
    let ours = core.vms.keys().map(|vm| NicId::new(*vm, 0)).collect();
    let running = core.vms.iter().filter(|(_, v)| v.process.is_some()).map(|(vm, _)| vm);
    let specs = running.filter_map(|vm| core.planned.get(vm)?.nic.as_ref().map(|nic| nic.spec.clone()));
    (ours, specs.filter(|spec| !there.contains(&spec.id)).collect())
}
