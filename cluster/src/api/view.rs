//! What users see of a VM: its record, and what this node knows besides.

use blixard_agent_api::VmReport;
use blixard_api::vm::{Phase, Timing, VmView};

use super::Api;
use crate::host::local::{Host, Link};
use crate::state::{State, VmRecord};

/// How a VM looks from here. `host` is this node's host; it says nothing about VMs of other nodes.
pub fn view(api: &Api, state: &State, host: &Host, vm: &VmRecord) -> VmView {
    let here = vm.node == api.consensus.node();
    let told = host.seen.as_ref().filter(|_| here).and_then(|seen| seen.vm(vm.id));
    let current = told.filter(|t| t.epoch.0 == vm.epoch && t.start.0 == vm.observed.start);
    let fresh = vm.observed.start == vm.start;
    let observed = &vm.observed;
    VmView {
        id: vm.id,
        name: vm.name.clone(),
        project: vm.project.clone(),
        spec: vm.spec.clone(),
        generation: vm.generation,
        created_at_ms: vm.created_at_ms,
        desired: vm.desired,
        phase: observed.phase,
        reason: reason(host, here, vm, current),
        node: state
            .node(vm.node)
            .filter(|_| vm.upkeep.leaving.is_none_or(|leaving| !leaving.released))
            .map(|node| node.name.clone()),
        epoch: vm.epoch,
        start: vm.start,
        image_digest: vm.pins.image.digest.to_string(),
        addresses: vm.nic.as_ref().map(super::super::state::NicRecord::addresses).unwrap_or_default(),
        started_at_ms: observed.started_at_ms.filter(|_| fresh),
        ended_at_ms: observed.ended_at_ms.filter(|_| fresh),
        exit: observed.exit.clone().filter(|_| fresh),
        workload: observed.workload.filter(|_| fresh),
        health: observed.health.clone().filter(|_| fresh),
        timing: here.then(|| timing(api, vm, told)),
        memory_bytes: current.and_then(|t| t.memory_bytes),
        observed_age_ms: told.and(host.seen.as_ref()).map(crate::host::local::Seen::age_ms),
    }
}

fn reason(host: &Host, here: bool, vm: &VmRecord, told: Option<&VmReport>) -> Option<String> {
    let moving =
        matches!(vm.observed.phase, Phase::Pending | Phase::Preparing | Phase::Starting | Phase::Stopping);
    if here && moving {
        if let Link::Down { reason } = &host.link {
            return Some(format!("agent unreachable: {reason}"));
        }
        if let Some(trouble) = &host.trouble {
            return Some(trouble.clone());
        }
    }
    told.and_then(|t| t.reason.clone()).or_else(|| vm.observed.reason.clone())
}

fn timing(api: &Api, vm: &VmRecord, told: Option<&VmReport>) -> Timing {
    let moments = api.local.moments(vm.id, vm.start);
    let told = told.filter(|t| t.start.0 == vm.start);
    Timing {
        request_us: moments.request_us,
        applied_us: api.consensus.replica().applied_us(vm.id, vm.start),
        planned_us: moments.planned_us,
        steps: told
            .map(|t| t.steps.iter().map(|s| (s.step.clone(), s.begin_us, s.end_us)).collect())
            .unwrap_or_default(),
        boot: told.map(|t| t.boot).unwrap_or_default(),
    }
}
