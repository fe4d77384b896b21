//! Leases: a host that the cluster may have given up runs no VM that the cluster may have started elsewhere.
//!
//! The node renews the lease as a moment of CLOCK_BOOTTIME, which also counts while the host sleeps and is the same for
//! node and agent. When it has passed, VMs whose plan says so are frozen, and none is started; a renewal thaws them. The
//! node renews only after its plan is as new as what the voters know, so what was placed elsewhere meanwhile is no longer
//! planned here and is killed without ever being thawed.
//!
//! A VM is frozen by its cgroup, or by SIGSTOP where there is none: both without asking the VMM.
//!
//! All of it needs an agent that runs at that moment. For when it does not, [`guard`] is another process that reads the same files.
//!
//! What is kept is the moment, in the run folder with the boot that it is about, and durably that there are leases at all.
//! A host that starts again has none then until the node renews it: what its stored plan lists may run elsewhere by now.

use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use blixard_agent_api::plan::OnLeaseEnd;
use blixard_agent_api::{Generation, HeldLease, Problem, ProblemKind, Start, VmPlan};
use blixard_vmm_api::VmId;
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::host::{Core, Host, Vm, Vmm, sentence};
use crate::{durable, guard, process};

/// Name of the file in the run folder.
const FILE: &str = "lease.json";
/// Name of the file in the state folder that is there when this host runs by leases.
const MARK: &str = "leased";
/// Longest lease from now on, in milliseconds: a mistake of the node must not last.
const LEASE_MS_MAX: u64 = 10 * 60 * 1000;
/// Largest such file in bytes.
const FILE_BYTES_MAX: usize = 4096;
/// How often VMs are looked at while there is a lease: what could not be frozen or thawed is tried again by this.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// A lease of this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Boot that it is about.
    pub boot: String,
    /// Until when, in milliseconds of CLOCK_BOOTTIME.
    pub until_ms: u64,
}

/// Milliseconds of CLOCK_BOOTTIME.
pub fn boottime_ms() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// Whether a VM may run now. Pure.
pub fn allows(lease: Option<&Lease>, now_ms: u64, plan: &VmPlan) -> bool {
    plan.on_lease_end == OnLeaseEnd::RunOn || lease.is_none_or(|lease| now_ms < lease.until_ms)
}

/// Whether a VM with a VMM shall be frozen. Pure. `None`: it stays as it is, since it is about to be ended. One that was
/// frozen is then killed without ever being thawed.
fn freezes(lease: Option<&Lease>, now_ms: u64, plan: Option<&VmPlan>, runs: Option<Start>) -> Option<bool> {
    let plan = plan?;
    if !allows(lease, now_ms, plan) {
        return Some(true);
    }
    (runs == Some(plan.start)).then_some(false)
}

/// The start that a running VMM is.
fn start_of(entry: &Vm) -> Option<Start> {
    let launch = entry.known.as_ref().and_then(|known| known.launch.as_ref());
    launch.map(|launch| launch.start)
}

/// The lease that an agent begins with in this boot; none on a host without leases.
pub fn stored(run: &Path, state: &Path, boot: &str) -> Option<Lease> {
    // What cannot be read, or is about another boot, is taken for a lease that has ended: nothing runs twice.
    let ended = || Lease { boot: boot.to_owned(), until_ms: 0 };
    let read = durable::read_bounded(&run.join(FILE), FILE_BYTES_MAX);
    let of_run = match read {
        Ok(None) => None,
        Ok(Some(text)) => Some(serde_json::from_slice::<Lease>(&text).unwrap_or_else(|_| ended())),
        Err(_) => Some(ended()),
    };
    match of_run {
        Some(lease) if lease.boot == boot => Some(lease),
        Some(_) => Some(ended()),
        // An unknown mark is taken for one.
        None => marked(state).then(ended),
    }
}

/// The lease as far as the node itself says that it lasts: whoever reads it has not been told, since the agent was dead. By the same
/// rule as in [`renew`]: what the node says is about this boot and about no newer plan than the one here, and lasts no longer than
/// it may.
pub fn extended(lease: Lease, node_lease: &Path, planned: Generation) -> Lease {
    let held = HeldLease::read(node_lease).unwrap_or_else(|error| {
        tracing::warn!(path = %node_lease.display(), %error, "what the node says of its lease cannot be read");
        None
    });
    let most = boottime_ms().saturating_add(LEASE_MS_MAX);
    let counts =
        |held: &HeldLease| held.boot == lease.boot && held.generation <= planned && held.until_ms <= most;
    let until_ms = held.filter(counts).map_or(0, |held| held.until_ms);
    Lease { until_ms: lease.until_ms.max(until_ms), ..lease }
}

/// Whether this host runs by leases, as the state folder says; one that cannot be read says yes.
pub fn marked(state: &Path) -> bool {
    state.join(MARK).try_exists().unwrap_or(true)
}

/// The node renews the lease, or ends the time of leases (`None`).
///
/// # Errors
/// The plan here is older than `generation`, or the lease cannot be stored.
pub fn renew(host: &Host, until_ms: Option<u64>, generation: Generation) -> Result<(), Problem> {
    let refused = |kind, message: String| Problem { kind, message };
    // What the guard does at the end of the lease that there was, it has done now or does not do any more.
    let _held = guard::lock(&host.config.run).map_err(|e| refused(ProblemKind::Host, sentence(&e)))?;
    let now_ms = boottime_ms();
    if until_ms.is_some_and(|until_ms| until_ms > now_ms.saturating_add(LEASE_MS_MAX)) {
        let text = format!("a lease lasts {LEASE_MS_MAX} ms at most");
        return Err(refused(ProblemKind::Invalid, text));
    }
    let mut core = host.core();
    let planned = core.plan.as_ref().map(|plan| plan.generation).unwrap_or_default();
    if planned < generation {
        let text = format!("the plan here is {planned}, the lease is about {generation}");
        return Err(refused(ProblemKind::NotNow, text));
    }
    let (path, mark) = (host.config.run.join(FILE), host.config.state.join(MARK));
    let wrong =
        |error: std::io::Error| refused(ProblemKind::Host, format!("cannot store the lease: {error}"));
    let lease = match until_ms {
        Some(until_ms) => {
            // Never shorter: an answer that was late on the way changes nothing.
            let until_ms = until_ms.max(core.lease.as_ref().map_or(0, |lease| lease.until_ms));
            let lease = Lease { boot: host.boot_id.clone(), until_ms };
            let text = serde_json::to_vec(&lease).map_err(|e| refused(ProblemKind::Host, sentence(&e)))?;
            if core.lease.is_none() {
                // Before anybody hears that leases are enforced here: they are after a loss of power, too.
                durable::replace(&mark, b"").map_err(wrong)?;
            }
            durable::put(&path, &text).map_err(wrong)?;
            Some(lease)
        }
        None => {
            for file in [&path, &mark] {
                match std::fs::remove_file(file) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(wrong(error)),
                    _ => {}
                }
            }
            None
        }
    };
    let over = core.lease.as_ref().is_some_and(|lease| lease.until_ms <= now_ms);
    let news = core.lease.is_some() != lease.is_some();
    core.lease = lease;
    if over {
        ask_the_kernel(host, &mut core);
    }
    if news || over {
        tracing::info!(leased = core.lease.is_some(), over, "leases");
        core.news();
        host.wake.notify_one();
        host.tell_news();
    }
    host.lease_changed.notify_all();
    Ok(())
}

/// Finds out which VMs are frozen: the guard may have done it. What cannot be read is not known, and is set whatever it is.
fn ask_the_kernel(host: &Host, core: &mut Core) {
    let Ok(Some(tree)) = &host.cgroups else { return };
    for (vm, entry) in core.vms.iter_mut().filter(|(_, entry)| entry.process.is_some()) {
        entry.frozen = tree.told_to_freeze(*vm).ok();
    }
}

/// Freezes and thaws for as long as the agent lives.
pub fn run(host: &Arc<Host>) -> ! {
    loop {
        enforce(host);
        let core = host.core();
        let Some(lease) = &core.lease else {
            // Whoever sets a lease wakes this.
            drop(host.lease_changed.wait(core).unwrap_or_else(PoisonError::into_inner));
            continue;
        };
        let left = Duration::from_millis(lease.until_ms.saturating_sub(boottime_ms()));
        let wait = if left.is_zero() { LOOK_AGAIN } else { left.min(LOOK_AGAIN) };
        drop(host.lease_changed.wait_timeout(core, wait).unwrap_or_else(PoisonError::into_inner));
    }
}

/// A VM that shall be frozen or thawed.
struct Due {
    vm: VmId,
    freeze: bool,
    vmm: Arc<Vmm>,
}

/// Looks at each VM once.
fn enforce(host: &Host) {
    let now_ms = boottime_ms();
    let due: Vec<Due> = {
        let core = host.core();
        core.vms.iter().filter_map(|(vm, entry)| due(&core, now_ms, *vm, entry)).collect()
    };
    carry_out(host, due);
}

/// Freezes a VM whose VMM has just become known, when the lease has ended meanwhile: nobody has to look for it first.
pub fn catch_up(host: &Host, vm: VmId) {
    let due = {
        let core = host.core();
        core.vms.get(&vm).and_then(|entry| due(&core, boottime_ms(), vm, entry))
    };
    carry_out(host, due.into_iter().filter(|due| due.freeze).collect());
}

/// What is to be done with a VM, if it is not so already.
fn due(core: &Core, now_ms: u64, vm: VmId, entry: &Vm) -> Option<Due> {
    let plan = core.planned.get(&vm).map(AsRef::as_ref);
    let freeze = freezes(core.lease.as_ref(), now_ms, plan, start_of(entry))?;
    // After a restart of the agent nobody knows: then it is set, whatever it is.
    let vmm = entry.process.clone().filter(|_| entry.frozen != Some(freeze))?;
    Some(Due { vm, freeze, vmm })
}

/// All are told first, and waited for then: thousands freeze in the time of one.
fn carry_out(host: &Host, due: Vec<Due>) {
    let told: Vec<(Due, Result<(), String>)> = due
        .into_iter()
        .map(|due| {
            let result = tell(host, &due);
            (due, result)
        })
        .collect();
    for (Due { vm, freeze, vmm }, told) in told {
        match told.and_then(|()| wait(host, vm, freeze)) {
            Ok(()) => {
                // It may be another process by now, about which this says nothing.
                let before = host.change_known(vm, |entry| {
                    let same = entry.process.as_ref().is_some_and(|now| Arc::ptr_eq(now, &vmm));
                    if same { entry.frozen.replace(freeze) } else { None }
                });
                if freeze || before == Some(Some(true)) {
                    tracing::warn!(%vm, freeze, "lease: VM {}", if freeze { "frozen" } else { "thawed" });
                }
            }
            // Looked at again soon; a VM that has ended meanwhile is no longer found.
            Err(error) => tracing::warn!(%vm, freeze, error, "cannot freeze or thaw a VM"),
        }
    }
}

fn tell(host: &Host, due: &Due) -> Result<(), String> {
    match &host.cgroups {
        Ok(Some(tree)) => tree.freeze(due.vm, due.freeze).map_err(|e| sentence(&e)),
        _ => process::hold(&due.vmm.process, due.freeze).map_err(|e| e.to_string()),
    }
}

fn wait(host: &Host, vm: VmId, freeze: bool) -> Result<(), String> {
    match &host.cgroups {
        Ok(Some(tree)) => tree.wait_until_frozen(vm, freeze).map_err(|e| sentence(&e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use blixard_agent_api::HostPlan;
    use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
    use nix::unistd::Pid;

    use super::*;
    use crate::config::Config;
    use crate::host::Parts;
    use crate::ledger::Ledger;
    use crate::record::{Known, Launch};
    use crate::store::Store;
    use crate::vmm_link::{self, Watch};
    use crate::volume::file::FileVolumes;

    fn plan(start: u64, on_lease_end: OnLeaseEnd) -> VmPlan {
        let mut plan: VmPlan = serde_json::from_str(include_str!("../tests/plan.json")).unwrap();
        plan.start = Start(start);
        plan.on_lease_end = on_lease_end;
        plan
    }

    #[test]
    fn at_the_end_of_the_lease_those_that_may_run_elsewhere_freeze_and_the_others_run_on() {
        let lease = Lease { boot: "b".into(), until_ms: 100 };
        let (freeze, run_on) = (plan(1, OnLeaseEnd::Freeze), plan(1, OnLeaseEnd::RunOn));
        assert!(allows(Some(&lease), 99, &freeze) && !allows(Some(&lease), 100, &freeze));
        assert!(allows(Some(&lease), 100, &run_on), "it waits");
        assert!(allows(None, u64::MAX, &freeze), "a host without leases");
    }

    #[test]
    fn what_was_placed_again_or_is_no_longer_planned_is_never_thawed() {
        let lease = Lease { boot: "b".into(), until_ms: 100 };
        let freeze =
            |now_ms, plan: Option<&VmPlan>, runs| freezes(Some(&lease), now_ms, plan, Some(Start(runs)));
        let (current, next) = (plan(1, OnLeaseEnd::Freeze), plan(2, OnLeaseEnd::Freeze));
        assert_eq!(freeze(50, Some(&current), 1), Some(false), "its placement holds");
        assert_eq!(freeze(100, Some(&current), 1), Some(true));
        assert_eq!(freeze(50, None, 1), None, "also by an agent that has just begun and knows nothing of it");
        assert_eq!(freeze(50, Some(&next), 1), None);
        assert_eq!(freeze(100, Some(&next), 1), Some(true));
    }

    fn host(folder: &Path) -> Host {
        let (state, run) = (folder.join("state"), folder.join("run"));
        std::fs::create_dir_all(&state).unwrap();
        let config = Config {
            netd: run.join("netd.sock"),
            node_lease: run.join("node.json"),
            vmm: "/nowhere".into(),
            state: state.clone(),
            run,
            node_uid: 0,
            uid_base: 700_000,
            uid_count: 10,
            cgroup: None,
            no_cgroup: true,
        };
        Host::new(Parts {
            ledger: Ledger::open(&state.join("ledger")).unwrap().0,
            store: Store::open(&state.join("blobs")).unwrap(),
            volumes: Box::new(FileVolumes::open(&state).unwrap()),
            cgroups: Ok(None),
            program: Err("none".into()),
            watch: Watch::new().unwrap(),
            boot_id: "b".into(),
            memory_mib: 1,
            instance: 1,
            config,
        })
    }

    #[test]
    fn a_vmm_that_becomes_known_after_the_lease_has_ended_is_frozen_before_anybody_looks_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let host = host(folder.path());
        let freeze = plan(1, OnLeaseEnd::Freeze);
        let vm = freeze.vm;
        host.core().set_plan(HostPlan { vms: vec![freeze], ..HostPlan::default() });
        let attach = |until_ms| {
            host.core().lease = Some(Lease { boot: "b".into(), until_ms });
            let launch = Launch { start: Start(1), boot: "b".into(), process: None };
            host.change(vm, |entry| {
                entry.known = Some(Known { launch: Some(launch), ..Known::default() });
            });
            let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
            let pid = i32::try_from(child.id()).unwrap();
            let vmm = Vmm { pid, process: process::open(pid).unwrap(), said: None };
            vmm_link::attach(&host, vm, vmm).unwrap();
            let stopped = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WUNTRACED | WaitPidFlag::WNOHANG));
            let frozen = host.core().vms[&vm].frozen;
            child.kill().unwrap();
            child.wait().unwrap();
            (frozen, stopped.unwrap())
        };
        let (frozen, stopped) = attach(boottime_ms());
        assert_eq!(frozen, Some(true));
        assert!(matches!(stopped, WaitStatus::Stopped(..) | WaitStatus::StillAlive), "{stopped:?}");
        let (frozen, stopped) = attach(boottime_ms() + 600_000);
        assert_eq!((frozen, stopped), (None, WaitStatus::StillAlive), "its lease holds");
    }

    #[test]
    fn a_host_with_leases_has_none_after_a_boot_and_a_damaged_one_has_ended() {
        let (run, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let until = || stored(run.path(), state.path(), "b").map(|lease| lease.until_ms);
        assert_eq!(until(), None, "a host that never had one freezes nothing");
        std::fs::write(state.path().join(MARK), b"").unwrap();
        assert_eq!(until(), Some(0), "the run folder is empty after a boot");
        for (text, expected) in
            [(r#"{"boot":"a","until_ms":5}"#, 0), (r#"{"boot":"b","until_ms":5}"#, 5), ("half a li", 0)]
        {
            std::fs::write(run.path().join(FILE), text).unwrap();
            assert_eq!(until(), Some(expected), "{text}");
        }
    }
}
