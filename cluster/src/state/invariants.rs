//! What is true of every state, as named predicates: checked after each command in debug builds, tests and simulation.

use std::collections::{BTreeMap, BTreeSet};

use blixard_api::placement::Scope;
use blixard_api::vm::Desired;

use super::address::HostRange;
use super::{ANSWERS_MAX, State, VMS_MAX};
use crate::scheduler::{Size, cluster};

/// A property of the state.
pub struct Invariant {
    /// What is true, as a sentence.
    pub name: &'static str,
    /// Whether it is.
    pub holds: fn(&State) -> bool,
}

/// All of them.
pub const INVARIANTS: &[Invariant] = &[
    Invariant { name: "no two VMs of a project share a name", holds: names_are_unique },
    Invariant { name: "no two VMs share an address", holds: addresses_are_unique },
    Invariant { name: "every address is in its network and none is special", holds: addresses_are_in_range },
    Invariant { name: "every VM is on a known node", holds: nodes_are_known },
    Invariant { name: "placements, starts and generations are counted from 1", holds: counters_have_begun },
    Invariant {
        name: "a VM is off the plan only when it shall be gone or leaves",
        holds: unlisted_means_gone,
    },
    Invariant { name: "a VM that waits for a node is on no plan", holds: released_means_unlisted },
    Invariant {
        name: "what is placed is in the scheduler's view, on that node alone",
        holds: view_is_the_records,
    },
    Invariant { name: "what a node counts as taken is what its VMs take", holds: sums_are_right },
    Invariant {
        name: "no two members of a group are nearer than one of them wishes",
        holds: groups_keep_apart,
    },
    Invariant { name: "numbers of records are bounded", holds: numbers_are_bounded },
];

/// The properties that do not hold.
pub fn broken(state: &State) -> Vec<&'static str> {
    INVARIANTS.iter().filter(|i| !(i.holds)(state)).map(|i| i.name).collect()
}

/// Stops a debug build whose state is broken. With many VMs only every so often: looking at all of them after each
/// command would take quadratic time.
#[cfg(debug_assertions)]
pub(super) fn assert_all(state: &State) {
    if state.vms.len() > 100 && !state.revision.is_multiple_of(997) {
        return;
    }
    let broken = broken(state);
    debug_assert!(broken.is_empty(), "broken at revision {}: {broken:?}", state.revision);
}

fn names_are_unique(state: &State) -> bool {
    let names: BTreeSet<_> = state.vms.values().map(|vm| (&vm.project, &vm.name)).collect();
    names.len() == state.vms.len()
        && state.vms.values().all(|vm| state.vm_named(&vm.project, &vm.name).is_some_and(|v| v.id == vm.id))
        && state.names.values().map(std::collections::BTreeMap::len).sum::<usize>() == state.vms.len()
}

fn addresses_are_unique(state: &State) -> bool {
    let mut seen = BTreeSet::new();
    let nics = || state.vms.values().filter_map(|vm| vm.nic.as_ref());
    nics().flat_map(super::NicRecord::addresses).all(|address| seen.insert(address))
        && state.hosts.values().map(std::collections::BTreeMap::len).sum::<usize>() == nics().count()
}

fn addresses_are_in_range(state: &State) -> bool {
    state.vms.values().filter_map(|vm| vm.nic.as_ref()).all(|nic| {
        state.networks.get(&nic.network).is_some_and(|network| {
            HostRange::of(network).is_some_and(|range| range.holds(nic.host))
                && network.v4.contains(nic.v4.into())
                && network.v6.contains(nic.v6.into())
        })
    })
}

fn nodes_are_known(state: &State) -> bool {
    state.vms.values().all(|vm| state.nodes.contains_key(&vm.node))
}

fn counters_have_begun(state: &State) -> bool {
    state.vms.values().all(|vm| vm.start >= 1 && vm.epoch >= 1 && vm.generation >= 1)
}

fn unlisted_means_gone(state: &State) -> bool {
    state.vms.values().all(|vm| {
        let gone = vm.desired == Desired::Gone;
        let off = vm.unlisted_since > 0;
        (!gone || off) && (!off || gone || vm.upkeep.leaving.is_some())
    })
}

fn released_means_unlisted(state: &State) -> bool {
    let released = |vm: &super::VmRecord| vm.upkeep.leaving.is_some_and(|leaving| leaving.released);
    state.vms.values().all(|vm| !released(vm) || vm.unlisted_since > 0)
}

fn view_is_the_records(state: &State) -> bool {
    let placed =
        state.vms.values().filter_map(|vm| Some((vm.node, cluster::placed(vm, state.keeps_room())?)));
    let mut count = 0;
    for (node, placed) in placed {
        count += 1;
        if state.view.node(node).and_then(|n| n.vms.get(&placed.id)).is_none_or(|known| **known != placed) {
            return false;
        }
    }
    state.view.nodes().map(|node| node.vms.len()).sum::<usize>() == count
        && state
            .nodes
            .values()
            .all(|node| state.view.node(node.id).is_some_and(|known| known.info == cluster::node_info(node)))
}

/// That it is never more than there is, is checked over time in `apply_place_test.rs`: an operator may make a room smaller.
fn sums_are_right(state: &State) -> bool {
    state.view.nodes().all(|node| {
        let sum = node.vms.values().fold(Size::default(), |sum, vm| sum.plus(vm.size));
        sum == node.used
    })
}

fn groups_keep_apart(state: &State) -> bool {
    let mut seen: BTreeMap<(&str, &str, usize, u32), (usize, bool)> = BTreeMap::new();
    for node in state.view.nodes() {
        for vm in node.vms.values() {
            for wanted in &vm.groups {
                for (at, (scope, domain)) in Scope::ALL.into_iter().zip(node.domains).enumerate() {
                    let hard = !wanted.soft && wanted.scope == scope;
                    let key = (vm.project.as_str(), wanted.group.as_str(), at, domain);
                    let entry = seen.entry(key).or_default();
                    *entry = (entry.0 + 1, entry.1 | hard);
                }
            }
        }
    }
    // Labels may change under VMs that are there: only nodes are a matter of placement alone.
    seen.iter().filter(|((_, _, at, _), _)| *at == 0).all(|(_, (members, hard))| *members <= 1 || !hard)
}

fn numbers_are_bounded(state: &State) -> bool {
    state.vms.len() <= VMS_MAX
        && state.answers.len() <= ANSWERS_MAX
        && state.answer_ages.len() == state.answers.len()
}
