//! Which VMs of lower priority make room, when there is none.

use std::collections::BTreeMap;
use std::sync::Arc;

use blixard_api::VmId;
use blixard_api::placement::PreemptionPolicy;

use super::model::{Placed, Request, Size};
use super::place::Search;
use super::view::{NodeState, View};
use crate::state::NodeId;

/// How many nodes are worked out in detail; those whose least important VMs suffice come first.
const CANDIDATES_MAX: usize = 64;

/// What stopping a set of VMs costs, best first.
type Price = (u64, u64, usize);

/// The node and the VMs to stop there. None has the priority of the request or a higher one.
pub(super) fn place(view: &View, request: &Request<'_>, search: &Search<'_>) -> Option<(NodeId, Vec<VmId>)> {
    let policy = request.placement.preemption.policy;
    if policy == PreemptionPolicy::Never {
        return None;
    }
    let mut candidates: Vec<(u16, NodeId, &Arc<NodeState>)> = view
        .nodes()
        .filter_map(|node| Some((highest_needed(node, request)?, node.info.id, node)))
        .filter(|(_, _, node)| node.info.room.is_some() && search.refused_by_others(node))
        .collect();
    candidates.sort_by_key(|(priority, id, _)| (*priority, *id));
    candidates.truncate(CANDIDATES_MAX);
    let priced = candidates.into_iter().filter_map(|(_, id, node)| {
        let victims = victims(node, request, policy)?;
        Some((price(&victims, policy), id, victims))
    });
    let (_, node, victims) = priced.min_by_key(|(price, id, _)| (*price, *id))?;
    let mut victims: Vec<VmId> = victims.iter().map(|vm| vm.id).collect();
    victims.sort_unstable();
    Some((node, victims))
}

/// The lowest priority such that all VMs up to it together leave enough room; `None` when those below the request do not.
fn highest_needed(node: &NodeState, request: &Request<'_>) -> Option<u16> {
    let mut freed = Size::default();
    let devices = !request.placement.accelerators.is_empty();
    for (priority, (_, size)) in node.by_priority.range(..request.placement.priority) {
        freed = freed.plus(*size);
        if node.short_of(request.size, freed).is_none() && (!devices || fits(node, request, *priority)) {
            return Some(*priority);
        }
    }
    None
}

/// Whether all VMs up to this priority together leave enough devices.
fn fits(node: &NodeState, request: &Request<'_>, priority: u16) -> bool {
    let gone: Vec<&Arc<Placed>> =
        node.vms.values().filter(|vm| !vm.stays && vm.priority <= priority).collect();
    enough(node, request, &gone)
}

/// Whether the request has room once these have gone.
fn enough(node: &NodeState, request: &Request<'_>, gone: &[&Arc<Placed>]) -> bool {
    let freed = gone.iter().fold(Size::default(), |sum, vm| sum.plus(vm.size));
    if node.short_of(request.size, freed).is_some() {
        return false;
    }
    let wanted = &request.placement.accelerators;
    if wanted.is_empty() {
        return true;
    }
    let mut devices: BTreeMap<&str, u32> = BTreeMap::new();
    for (kind, count) in gone.iter().flat_map(|vm| &vm.accelerators) {
        let freed = devices.entry(kind).or_default();
        *freed = freed.saturating_add(*count);
    }
    wanted.iter().all(|(kind, count)| {
        let freed = devices.get(kind.as_str()).copied().unwrap_or(0);
        let used = node.used_accelerators.get(kind).copied().unwrap_or(0).saturating_sub(freed);
        used.saturating_add(*count) <= node.info.accelerators.get(kind).copied().unwrap_or(0)
    })
}

/// What stopping a VM costs: its size, weighted by its priority. 64 MiB weigh as much as an eighth of a processor.
fn disruption(vm: &Placed) -> u64 {
    let size = vm.size.memory_mib / 64 + vm.size.cpu_milli / 125;
    size.saturating_add(1).saturating_mul(u64::from(vm.priority).saturating_add(1))
}

/// A set of VMs of this node that suffices and of which none can be left out.
fn victims<'a>(
    node: &'a NodeState,
    request: &Request<'_>,
    policy: PreemptionPolicy,
) -> Option<Vec<&'a Arc<Placed>>> {
    let mut lower: Vec<&Arc<Placed>> =
        node.vms.values().filter(|vm| !vm.stays && vm.priority < request.placement.priority).collect();
    match policy {
        // The least important first, of those the largest: few are enough.
        PreemptionPolicy::LowerPriority | PreemptionPolicy::Never => lower.sort_by_key(|vm| {
            (vm.priority, std::cmp::Reverse((vm.size.memory_mib, vm.size.cpu_milli)), vm.id)
        }),
        PreemptionPolicy::CostAware => lower.sort_by_key(|vm| (disruption(vm), vm.id)),
    }
    let mut chosen: Vec<&Arc<Placed>> = Vec::new();
    for vm in lower {
        chosen.push(vm);
        if !enough(node, request, &chosen) {
            continue;
        }
        // The dearest may be left out first, now that others are in.
        let mut at = chosen.len();
        while at > 0 {
            at -= 1;
            let without: Vec<_> =
                chosen.iter().enumerate().filter(|(i, _)| *i != at).map(|(_, vm)| *vm).collect();
            if enough(node, request, &without) {
                chosen = without;
            }
        }
        return Some(chosen);
    }
    None
}

fn price(victims: &[&Arc<Placed>], policy: PreemptionPolicy) -> Price {
    let cost = victims.iter().map(|vm| disruption(vm)).fold(0, u64::saturating_add);
    let highest = victims.iter().map(|vm| u64::from(vm.priority)).max().unwrap_or(0);
    match policy {
        PreemptionPolicy::CostAware => (cost, highest, victims.len()),
        PreemptionPolicy::LowerPriority | PreemptionPolicy::Never => (highest, cost, victims.len()),
    }
}
