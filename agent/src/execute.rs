//! Carries out one step of one VM: the deed, its records, and what is then there.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use blixard_agent_api::report::StepTime;
use blixard_agent_api::{BlobRef, Start, VmPlan};
use blixard_netd_api::{NetdError, NicId, ProblemKind};
use blixard_vmm_api::control::Request;
use blixard_vmm_api::exit::ExitRecord;
use blixard_vmm_api::stats::FlightEvent;
use blixard_vmm_api::{ExitReason, VmId};

use crate::cgroup::Limits;
use crate::host::{End as Ending, Host, Vm, Vmm, monotonic_us, sentence, unix_ms};
use crate::jail::{JailError, Jailed};
use crate::launch::{self, EXIT_RECORD, LaunchError, Resources};
use crate::ledger::{LedgerError, Position};
use crate::record::{End, Known, ProcessId, Record, Slot};
use crate::steps::{Step, Wish};
use crate::{durable, lease, process, vmm_link};

/// Largest exit record that is read, in bytes.
const EXIT_RECORD_BYTES_MAX: usize = 64 << 10;

/// Why a step was not done.
#[derive(Debug)]
pub struct Failure {
    /// For people.
    pub reason: String,
    /// Trying again would not help: the start has failed.
    pub lasting: bool,
    /// Another host may do better.
    pub refuses: bool,
}

impl Failure {
    fn passing(error: &dyn std::error::Error) -> Self {
        Self::of(sentence(error), false)
    }

    fn lasting(reason: impl Into<String>) -> Self {
        Self::of(reason, true)
    }

    /// A failure of the VM, not of the host.
    pub fn of(reason: impl Into<String>, lasting: bool) -> Self {
        Self { reason: reason.into(), lasting, refuses: false }
    }

    /// The host cannot run this VM, or none.
    fn refusal(reason: impl Into<String>) -> Self {
        Self { refuses: true, ..Self::lasting(reason) }
    }
}

impl From<LedgerError> for Failure {
    fn from(error: LedgerError) -> Self {
        Self::passing(&error)
    }
}

/// The name of a step of a start, as in the report.
fn name(step: &Step) -> Option<&'static str> {
    match step {
        Step::MakeVolume => Some("volume"),
        Step::MakeFolders => Some("folders"),
        Step::OpenNic => Some("nic"),
        Step::MakeCgroup => Some("cgroup"),
        Step::Launch => Some("launch"),
        _ => None,
    }
}

/// Does one step.
///
/// # Errors
/// The deed failed; it may be tried again unless the failure is lasting.
pub fn step(host: &Host, vm: VmId, step: &Step) -> Result<(), Failure> {
    let begin_us = monotonic_us();
    tracing::debug!(%vm, ?step, "step");
    deed(host, vm, step)?;
    let end_us = monotonic_us();
    host.change(vm, |entry| {
        entry.failing = None;
        if let Some(name) = name(step) {
            entry.times.push(StepTime { step: name.into(), begin_us, end_us });
        }
    });
    Ok(())
}

fn deed(host: &Host, vm: VmId, step: &Step) -> Result<(), Failure> {
    match step {
        Step::Admit => admit(host, vm),
        Step::Begin(start) => begin(host, vm, *start),
        Step::MakeVolume => make_volume(host, vm),
        Step::MakeFolders => make_folders(host, vm),
        Step::OpenNic => open_nic(host, vm),
        Step::MakeCgroup => make_cgroup(host, vm),
        Step::Launch => launch_vmm(host, vm),
        Step::Fail(fault) => fail(host, vm, fault.to_string(), false),
        Step::AskEnd => ask_end(host, vm),
        Step::Kill => kill(host, vm),
        Step::RecordEnd => record_end(host, vm),
        Step::RemoveNic => remove_nic(host, vm),
        Step::RemoveCgroup => remove_cgroup(host, vm),
        Step::RemoveSockets => {
            durable::remove_folder(&host.config.sockets_of(vm)).map_err(|e| Failure::passing(&e))?;
            host.change(vm, |entry| entry.found.sockets = false);
            Ok(())
        }
        Step::RemoveVolume => {
            record(host, Record::Discard { vm })?;
            host.volumes.remove(vm).map_err(|e| Failure::passing(&e))?;
            host.change(vm, |entry| {
                entry.found.volume_bytes = None;
                entry.found.storage = false;
            });
            Ok(())
        }
        Step::RemoveFiles => {
            durable::remove_folder(&host.config.files_of(vm)).map_err(|e| Failure::passing(&e))?;
            host.change(vm, |entry| entry.found.files = false);
            Ok(())
        }
        Step::Forget => {
            // A half-made volume is not found, and may lie beside its place.
            record(host, Record::Discard { vm })?;
            host.volumes.remove(vm).map_err(|e| Failure::passing(&e))?;
            record(host, Record::Gone { vm })?;
            tracing::info!(%vm, "gone");
            Ok(())
        }
    }
}

/// Appends a record and takes it over, in one: the ledger is never written anew in between.
fn record(host: &Host, record: Record) -> Result<Position, Failure> {
    let vm = record.vm();
    let position = host.change(vm, |entry| {
        let position = host.ledger.append(&record)?;
        entry.known = record.apply(entry.known.take());
        Ok::<_, LedgerError>(position)
    });
    Ok(position?)
}

fn plan(host: &Host, vm: VmId) -> Result<Arc<VmPlan>, Failure> {
    let planned = host.core().planned.get(&vm).cloned();
    planned.ok_or_else(|| Failure::of("it is no longer planned", false))
}

fn slot(host: &Host, vm: VmId) -> Result<Slot, Failure> {
    let known = host.core().vms.get(&vm).and_then(|v| v.known.as_ref().map(|k| k.slot));
    known.ok_or_else(|| Failure::of("it has no slot", false))
}

fn admit(host: &Host, vm: VmId) -> Result<(), Failure> {
    let epoch = plan(host, vm)?.epoch;
    let mut core = host.core();
    let own = core.vms.get(&vm).and_then(|v| v.known.as_ref().map(|k| k.slot));
    let slot = match own {
        Some(slot) => slot,
        None => {
            let taken: std::collections::BTreeSet<Slot> =
                core.vms.values().filter_map(|v| v.known.as_ref().map(|k| k.slot)).collect();
            let free = (0..host.config.uid_count).find(|slot| !taken.contains(slot));
            free.ok_or_else(|| Failure::refusal("all user ids for VMs are taken"))?
        }
    };
    // Appended while the state is held: nobody else finds the same slot free.
    let record = Record::Admit { vm, epoch, slot };
    host.ledger.append(&record)?;
    let entry = core.vms.entry(vm).or_default();
    entry.known = record.apply(entry.known.take());
    host.refresh(&mut core, vm);
    Ok(())
}

fn begin(host: &Host, vm: VmId, start: Start) -> Result<(), Failure> {
    host.change(vm, |entry| {
        entry.times.clear();
        entry.waits_since_us = None;
        entry.status = None;
    });
    record(host, Record::Begin { vm, start, at_ms: unix_ms() })?;
    let plan = plan(host, vm)?;
    let mtu = mtu(host, &plan);
    launch::config(&plan, slot(host, vm)?, mtu).map_err(|e| Failure::lasting(sentence(&e)))?;
    if u64::from(plan.memory_mib) > host.memory_mib {
        let (wanted, there) = (plan.memory_mib, host.memory_mib);
        return Err(Failure::refusal(format!(
            "{wanted} MiB of memory are planned, the host has {there} MiB"
        )));
    }
    Ok(())
}

fn make_volume(host: &Host, vm: VmId) -> Result<(), Failure> {
    let size = plan(host, vm)?.volume.size_bytes;
    host.change(vm, |entry| entry.found.storage = true);
    host.volumes.create(vm, size).map_err(|e| Failure::passing(&e))?;
    host.change(vm, |entry| entry.found.volume_bytes = Some(size));
    record(host, Record::Volume { vm, size_bytes: size })?;
    Ok(())
}

fn make_folders(host: &Host, vm: VmId) -> Result<(), Failure> {
    durable::folder(&host.config.sockets_of(vm)).map_err(|e| Failure::passing(&e))?;
    durable::folder(&host.config.files_of(vm)).map_err(|e| Failure::passing(&e))?;
    host.change(vm, |entry| {
        entry.found.sockets = true;
        entry.found.files = true;
    });
    Ok(())
}

fn open_nic(host: &Host, vm: VmId) -> Result<(), Failure> {
    let plan = plan(host, vm)?;
    let Some(nic) = &plan.nic else { return Ok(()) };
    // Recorded before it can exist: a removal that comes next looks for it.
    let noted = host.core().vms.get(&vm).is_some_and(|v| v.known.as_ref().is_some_and(|k| k.nic));
    if !noted {
        record(host, Record::Nic { vm, exists: true })?;
    }
    host.change(vm, |entry| entry.found.nic = true);
    let tap = host.netd.open_nic(&nic.spec).map_err(|error| {
        if let NetdError::Refused(problem) = &error {
            if problem.kind == ProblemKind::NoNetwork {
                lost_network(host, &nic.spec.network);
            }
            return Failure::of(sentence(&error), problem.kind == ProblemKind::Invalid);
        }
        Failure::passing(&error)
    })?;
    host.change(vm, |entry| entry.tap = Some(tap));
    Ok(())
}

fn lost_network(host: &Host, name: &str) {
    let mut core = host.core();
    core.networks.remove(name);
    core.networks_due = Some(Instant::now());
    host.wake.notify_one();
}

fn make_cgroup(host: &Host, vm: VmId) -> Result<(), Failure> {
    let plan = plan(host, vm)?;
    match &host.cgroups {
        Err(reason) => return Err(Failure::refusal(format!("no cgroup for it: {reason}"))),
        Ok(None) => {}
        Ok(Some(tree)) => {
            let limits = Limits::of(plan.vcpus, plan.memory_mib);
            tree.create(vm, &limits).map_err(|e| Failure::passing(&e))?;
        }
    }
    host.change(vm, |entry| entry.found.cgroup = true);
    Ok(())
}

fn mtu(host: &Host, plan: &VmPlan) -> u16 {
    let core = host.core();
    let network = plan.nic.as_ref().and_then(|nic| core.networks.get(&nic.spec.network));
    network.map_or(1500, |network| network.mtu)
}

fn open_content(host: &Host, blob: &BlobRef) -> Result<OwnedFd, Failure> {
    host.store.open_blob(blob).map_err(|e| Failure::passing(&e))
}

fn launch_vmm(host: &Host, vm: VmId) -> Result<(), Failure> {
    let plan = plan(host, vm)?;
    let program = host.program.as_ref().map_err(|reason| Failure::refusal(reason.clone()))?;
    let slot = slot(host, vm)?;
    let cgroup = match &host.cgroups {
        Ok(Some(tree)) => Some(tree.open_leaf(vm).map_err(|e| Failure::passing(&e))?),
        _ => None,
    };
    let content = [
        open_content(host, &plan.kernel)?,
        open_content(host, &plan.initramfs)?,
        open_content(host, &plan.image)?,
    ];
    let volume = host.volumes.open(vm).map_err(|e| Failure::passing(&e))?;
    let start = plan.start;
    let position = record(host, Record::Launching { vm, start, boot: host.boot_id.clone() })?;
    // A VMM whose start a loss of power takes back could run twice.
    host.ledger.sync_to(position)?;
    // Opening and the disk take their time: what was allowed when this step was chosen may not be any more. The step is
    // chosen again when the lease is renewed.
    let leased = lease::allows(host.core().lease.as_ref(), lease::boottime_ms(), &plan);
    if !leased {
        return Err(Failure::of("the lease of this host has ended", false));
    }
    let resources = Resources {
        program,
        sockets: &host.config.sockets_of(vm),
        files: &host.config.files_of(vm),
        root: &host.config.run.join("jail"),
        slot,
        identity: host.config.uid_base.saturating_add(slot),
        cgroup,
        content,
        volume,
        // Taken for good: after a failed try the nic is opened anew.
        tap: host.change(vm, |entry| entry.tap.take()),
        mtu: mtu(host, &plan),
    };
    let Jailed { pid, process, said } = launch::launch(&plan, resources).map_err(|error| {
        let lasting = match &error {
            LaunchError::Config(_) | LaunchError::Encode(_) => true,
            LaunchError::Jail(JailError::Deed { .. }) => true,
            LaunchError::Open { operation, .. } => *operation == "open /dev/kvm",
            LaunchError::Jail(_) => false,
        };
        let refuses = matches!(&error, LaunchError::Open { .. }) && lasting;
        Failure { reason: sentence(&error), lasting, refuses }
    })?;
    let vmm = Vmm { pid, process, said: Some(said) };
    vmm_link::attach(host, vm, vmm).map_err(|error| {
        // Unwatched it could end unseen.
        let vmm = host.change(vm, |entry| entry.process.take());
        if let Some(Err(error)) = vmm.map(|vmm| process::kill(&vmm.process)) {
            tracing::error!( %error, "cannot end a VMM that cannot be watched");
        }
        Failure::passing(&error)
    })?;
    // Gone already when its start time cannot be read: then its end is what is recorded.
    let started = process::started(pid).unwrap_or(0);
    record(host, Record::Launched { vm, start, process: ProcessId { pid, started } })?;
    tracing::info!(%vm, pid, start = start.0, "VMM started");
    Ok(())
}

/// Records that the newest start cannot be; `refused` when that is because of the host.
///
/// # Errors
/// The ledger cannot be written.
pub fn fail(host: &Host, vm: VmId, reason: String, refused: bool) -> Result<(), Failure> {
    tracing::warn!(%vm, reason, "start failed");
    let known = host.core().vms.get(&vm).and_then(|v| v.known.clone()).unwrap_or_default();
    let end =
        End { start: known.begun_start(), at_ms: unix_ms(), fault: Some(reason), refused, ..End::default() };
    record(host, Record::Ended { vm, end: Box::new(end) })?;
    host.change(vm, |entry| entry.failing = None);
    Ok(())
}

fn ask_end(host: &Host, vm: VmId) -> Result<(), Failure> {
    let plan = host.core().planned.get(&vm).cloned();
    let grace = Vm::grace(plan.as_deref());
    let deadline = Instant::now() + grace;
    let link = host.change(vm, |entry| {
        entry.ending = Some(Ending { deadline, killed: false });
        entry.link.clone()
    });
    host.look_at(deadline, vm);
    // A VMM that cannot be asked is killed when its time is over.
    match link.as_ref().map(|link| link.send(&Request::Stop)) {
        Some(Ok(())) => {}
        Some(Err(error)) => tracing::warn!(%vm, %error, "cannot ask the VMM to stop"),
        None => tracing::warn!(%vm, "no connection to the VMM to ask it to stop"),
    }
    Ok(())
}

fn kill(host: &Host, vm: VmId) -> Result<(), Failure> {
    let vmm = host.core().vms.get(&vm).and_then(|entry| entry.process.clone());
    let Some(vmm) = vmm else { return Ok(()) };
    // The process first: it is the only one, and its descriptor cannot mean another.
    process::kill(&vmm.process).map_err(|e| Failure::passing(&e))?;
    if let Ok(Some(tree)) = &host.cgroups {
        tree.kill(vm).map_err(|e| Failure::passing(&e))?;
    }
    host.change(vm, |entry| entry.ending = Some(Ending { deadline: Instant::now(), killed: true }));
    Ok(())
}

/// The newest events of a VMM's flight recorder, oldest first, with their time in milliseconds before the last one.
fn last_events(events: &[FlightEvent]) -> String {
    const SHOWN: usize = 16;
    let end = events.last().map_or(0, |event| event.at_us);
    let newest = events.get(events.len().saturating_sub(SHOWN)..).unwrap_or_default();
    let line = |event: &FlightEvent| {
        let ago = end.saturating_sub(event.at_us) / 1000;
        format!("-{ago}ms {}: {}", vmm_link::printable(&event.what), vmm_link::printable(&event.event))
    };
    newest.iter().map(line).collect::<Vec<_>>().join("; ")
}

fn record_end(host: &Host, vm: VmId) -> Result<(), Failure> {
    let path = host.config.files_of(vm).join(EXIT_RECORD);
    let said: Option<ExitRecord> = durable::read_bounded(&path, EXIT_RECORD_BYTES_MAX)
        .ok()
        .flatten()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .filter(|said: &ExitRecord| said.vm == vm);
    if let Some(said) = said.as_ref().filter(|said| !said.events.is_empty()) {
        tracing::warn!(%vm, events = last_events(&said.events), "the last events of a VMM that failed");
    }
    let out_of_memory = matches!(&host.cgroups, Ok(Some(tree)) if tree.ended_by_memory(vm));
    let end = {
        let mut core = host.core();
        let (wish, found) = core.view(vm, host);
        let Some(entry) = core.vms.get(&vm) else { return Ok(()) };
        let known = entry.known.clone().unwrap_or_default();
        let mut end = how_it_ended(&known, wish, entry, said, out_of_memory);
        if found.rebooted && end.exit.is_none() {
            end.fault = Some("the host was booted again while it ran".into());
        }
        end
    };
    tracing::info!(%vm, start = end.start.0, exit = ?end.exit, fault = ?end.fault, "start ended");
    record(host, Record::Ended { vm, end: Box::new(end) })?;
    host.change(vm, |entry| {
        entry.outcome = None;
        entry.frozen = None;
        entry.ending = None;
        entry.status = None;
        entry.failing = None;
    });
    Ok(())
}

fn how_it_ended(
    known: &Known,
    wish: Option<Wish>,
    entry: &Vm,
    said: Option<ExitRecord>,
    out_of_memory: bool,
) -> End {
    let start = known.launch.as_ref().map_or(known.begun_start(), |l| l.start);
    let status = entry.status.as_ref();
    let mut end = End {
        start,
        at_ms: unix_ms(),
        workload: status.and_then(|s| s.workload),
        guest_ready: status.is_some_and(|s| s.guest_ready),
        boot: status.map(|s| s.times).unwrap_or_default(),
        ..End::default()
    };
    let told = status.and_then(|s| s.guest_problem.clone());
    let outcome = entry.outcome.clone().unwrap_or_else(|| "nobody saw how".into());
    if let Some(said) = said {
        let told = said.guest_problem.map(|text| vmm_link::printable(&text)).or(told);
        end.workload = said.workload.or(end.workload);
        end.fault = match &said.reason {
            ExitReason::PowerOff | ExitReason::Reset | ExitReason::Killed => {
                told.map(|text| format!("the guest reported: {text}"))
            }
            reason => Some(vmm_link::printable(&reason.to_string())),
        };
        end.exit = Some(said.reason);
        return end;
    }
    let unwanted = wish.is_none_or(|w| !w.run || w.start > start);
    if entry.ending.is_some_and(|e| e.killed) || unwanted {
        end.exit = Some(ExitReason::Killed);
    } else if out_of_memory {
        end.fault = Some("it used more memory than its limit".into());
    } else {
        end.fault = Some(format!("its VMM ended without a record: {outcome}"));
    }
    end
}

fn remove_nic(host: &Host, vm: VmId) -> Result<(), Failure> {
    // Closed first: netd does not remove what is in use.
    drop(host.change(vm, |entry| entry.tap.take()));
    host.netd.remove_nic(&NicId::new(vm, 0)).map_err(|e| Failure::passing(&e))?;
    let known = host.core().vms.get(&vm).is_some_and(|v| v.known.is_some());
    if known {
        record(host, Record::Nic { vm, exists: false })?;
    }
    host.change(vm, |entry| entry.found.nic = false);
    Ok(())
}

fn remove_cgroup(host: &Host, vm: VmId) -> Result<(), Failure> {
    if let Ok(Some(tree)) = &host.cgroups {
        tree.remove(vm).map_err(|e| Failure::passing(&e))?;
    }
    host.change(vm, |entry| entry.found.cgroup = false);
    Ok(())
}
