//! What is there when the agent starts: processes, cgroups, volumes, folders. VMMs that run are adopted.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Arc;

use blixard_agent_api::VmPlan;
use blixard_vmm_api::VmId;

use crate::host::{Host, Vm, Vmm, sentence};
use crate::record::{Known, ProcessId, Record};
use crate::{process, vmm_link};

/// Fills the state from the ledger, the plan and the host. To be called once, before the loop.
///
/// # Errors
/// One sentence: what cannot be looked at.
pub fn look(host: &Host, known: BTreeMap<VmId, Known>) -> Result<(), String> {
    let volumes = host.volumes.list().map_err(|e| sentence(&e))?;
    let cgroups: BTreeSet<VmId> = match &host.cgroups {
        Ok(Some(tree)) => tree.list().map_err(|e| sentence(&e))?.into_iter().collect(),
        _ => BTreeSet::new(),
    };
    let sockets = folders(&host.config.run.join("vm"));
    let files = folders(&host.config.state.join("vm"));
    let planned: BTreeMap<VmId, Arc<VmPlan>> = host.core().planned.clone();

    // A volume that no record explains may be somebody's data: it is told of, never removed.
    let stray: Vec<String> = volumes
        .keys()
        .filter(|vm| !known.contains_key(vm) && !planned.contains_key(vm))
        .map(ToString::to_string)
        .collect();
    let problem = (!stray.is_empty()).then(|| format!("volumes that belong to no VM: {}", stray.join(", ")));
    host.problem("volumes", problem);

    let mut all: BTreeSet<VmId> = known.keys().chain(planned.keys()).copied().collect();
    all.extend(cgroups.iter().chain(&sockets).chain(&files).copied());
    for vm in all {
        let known = known.get(&vm).cloned();
        let vmm = running(host, vm, known.as_ref());
        let mut entry = Vm::default();
        entry.found.volume_bytes = volumes.get(&vm).copied();
        entry.found.storage = known.is_some();
        entry.found.cgroup = cgroups.contains(&vm);
        entry.found.sockets = sockets.contains(&vm);
        entry.found.files = files.contains(&vm);
        entry.found.nic = known.as_ref().is_some_and(|k| k.nic);
        entry.known = known;
        if let Some(vmm) = &vmm {
            record_launched(host, vm, vmm, &mut entry)?;
        }
        host.core().vms.insert(vm, entry);
        if let Some(vmm) = vmm {
            tracing::info!(%vm, pid = vmm.pid, "VMM adopted");
            vmm_link::attach(host, vm, vmm).map_err(|e| format!("cannot watch the VMM of {vm}: {e}"))?;
        }
        let mut core = host.core();
        core.dirty.insert(vm);
        host.refresh(&mut core, vm);
    }
    Ok(())
}

/// Records a VMM that was started right before the agent died: its start has been, whatever comes.
fn record_launched(host: &Host, vm: VmId, vmm: &Vmm, entry: &mut Vm) -> Result<(), String> {
    let Some(launch) = entry.known.as_ref().and_then(|k| k.launch.as_ref()) else { return Ok(()) };
    if launch.process.is_some() {
        return Ok(());
    }
    let process = ProcessId { pid: vmm.pid, started: process::started(vmm.pid).unwrap_or(0) };
    let record = Record::Launched { vm, start: launch.start, process };
    host.ledger.append(&record).map_err(|e| sentence(&e))?;
    entry.known = record.apply(entry.known.take());
    Ok(())
}

/// The VMM of a VM, if it runs: the recorded process, else what is in its cgroup (it was started right before the agent
/// died, and not yet recorded).
fn running(host: &Host, vm: VmId, known: Option<&Known>) -> Option<Vmm> {
    let launch = known.and_then(|k| k.launch.as_ref()).filter(|l| l.boot == host.boot_id);
    if let Some(recorded) = launch.and_then(|l| l.process)
        && let Some(process) = process::open_recorded(recorded)
    {
        return Some(Vmm { pid: recorded.pid, process, said: None });
    }
    let Ok(Some(tree)) = &host.cgroups else { return None };
    let pids = tree.processes(vm);
    let found = pids.iter().find_map(|pid| process::open(*pid).ok().map(|process| (*pid, process)));
    // Checked after opening: a number in the cgroup is a process of this VM.
    let (pid, process) = found.filter(|(pid, _)| tree.processes(vm).contains(pid))?;
    Some(Vmm { pid, process, said: None })
}

/// Folders below `path` that are named like VMs.
fn folders(path: &Path) -> BTreeSet<VmId> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}
