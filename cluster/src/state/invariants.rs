//! What is true of every state, as named predicates: checked after each command in debug builds, tests and simulation.

use std::collections::BTreeSet;

use blixard_api::vm::Desired;

use super::address::HostRange;
use super::{ANSWERS_MAX, State, VMS_MAX};

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
    Invariant { name: "a VM is unlisted exactly when it shall be gone", holds: unlisted_means_gone },
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
    state.vms.values().all(|vm| (vm.desired == Desired::Gone) == (vm.unlisted_since > 0))
}

fn numbers_are_bounded(state: &State) -> bool {
    state.vms.len() <= VMS_MAX
        && state.answers.len() <= ANSWERS_MAX
        && state.answer_ages.len() == state.answers.len()
}
