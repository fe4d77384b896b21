//! The scheduler's view of replicated records.

use std::collections::BTreeMap;

use blixard_api::placement::OnNodeLoss;
use blixard_api::vm::{Desired, VmSpec};

use super::model::{Data, NodeInfo, Placed, Request, Size};
use super::view::View;
use crate::state::{Capacity, NodePolicy, NodeRecord, NodeStatus, VmRecord};

/// What a VM takes while it runs.
pub fn size(spec: &VmSpec) -> Size {
    Size {
        cpu_milli: u64::from(spec.vcpus).saturating_mul(1000),
        memory_mib: u64::from(spec.memory_mib),
        disk_mib: spec.disk_mib,
    }
}

/// A node as the scheduler knows it. One that is only suspected keeps its VMs and takes no new ones.
pub fn node_info(node: &NodeRecord) -> NodeInfo {
    let offer = &node.offer;
    let policy = &offer.policy;
    // What the operator says goes before what the node was started with.
    let mut labels = node.labels.clone();
    labels.extend(policy.labels.clone());
    NodeInfo {
        id: node.id,
        name: node.name.clone(),
        arch: offer.capacity.map(|capacity| capacity.arch).unwrap_or_default(),
        room: offer.capacity.map(|capacity| room(&capacity, policy)),
        accelerators: policy.accelerators.clone(),
        labels,
        taints: policy.taints.clone(),
        up: offer.status == NodeStatus::Up,
        cordoned: node.cordoned,
        cost: policy.cost,
        images: std::sync::Arc::default(),
    }
}

/// What VMs may take together: what is there without the reserve, times the overcommit.
fn room(capacity: &Capacity, policy: &NodePolicy) -> Size {
    let share = |there: u64, percent: u32| there.saturating_mul(u64::from(percent)) / 100;
    let cpu_milli = u64::from(capacity.cpus).saturating_mul(1000).saturating_sub(policy.reserve_cpu_milli);
    let memory_mib = capacity.memory_mib.saturating_sub(policy.reserve_memory_mib);
    Size {
        cpu_milli: share(cpu_milli, policy.cpu_percent),
        memory_mib: share(memory_mib, policy.memory_percent),
        disk_mib: share(capacity.disk_mib, policy.disk_percent),
    }
}

/// What a placed VM takes now; `None` when nothing of it is left on its node. One that has ended takes disk only, unless it `keeps` its
/// room until its policy starts it again: then it takes everything, and makes no room for others meanwhile.
pub fn placed(vm: &VmRecord, keeps: bool) -> Option<Placed> {
    if vm.upkeep.leaving.is_some_and(|leaving| leaving.released) {
        return None;
    }
    let whole = placed_whole(vm);
    let off_plan = vm.unlisted_since > 0 && vm.desired != Desired::Gone;
    let runs = !vm.has_ended() && !off_plan;
    if runs {
        return Some(whole);
    }
    if keeps && !off_plan && vm.restarts_by_itself() {
        return Some(Placed { stays: true, ..whole });
    }
    let size = Size { disk_mib: whole.size.disk_mib, ..Size::default() };
    Some(Placed { size, accelerators: BTreeMap::new(), stays: true, ..whole })
}

/// A VM as it will be placed.
pub fn placed_whole(vm: &VmRecord) -> Placed {
    let placement = &vm.spec.placement;
    Placed {
        id: vm.id,
        project: vm.project.clone(),
        size: size(&vm.spec),
        accelerators: placement.accelerators.clone(),
        groups: placement.anti_affinity.clone(),
        priority: placement.priority,
        stays: placement.on_node_loss == OnNodeLoss::Wait,
    }
}

/// Brings what is known of a VM into the view; see [`placed`].
pub fn put(view: &mut View, vm: &VmRecord, keeps: bool) {
    match placed(vm, keeps) {
        Some(placed) => view.put(vm.node, placed),
        None => view.take(vm.node, vm.id),
    }
}

/// A VM that needs a place.
pub fn request(vm: &VmRecord) -> Request<'_> {
    Request {
        project: &vm.project,
        size: size(&vm.spec),
        placement: &vm.spec.placement,
        image: Some(vm.pins.image.digest),
        data: Data::Anywhere,
        avoid: &vm.upkeep.avoid,
        untold: false,
    }
}
