//! What is looked at after each step, and what must be true once nothing is wrong any more.

use std::collections::BTreeMap;

use blixard_api::vm::{Desired, Phase};
use blixard_node::scheduler::{Decision, cluster, place};
use blixard_node::state::{NodeId, NodeStatus, State, VmRecord, invariants};

use crate::world::World;

/// Revisions whose states are remembered for comparison.
const REMEMBERED: usize = 256;

/// What is remembered between looks.
#[derive(Default)]
pub struct Checks {
    /// States by revision, and which node had it.
    states: BTreeMap<u64, (NodeId, State)>,
    /// The revision that each node had when it was looked at last.
    looked: BTreeMap<(NodeId, u64), u64>,
}

impl Checks {
    /// Looks at the states of all nodes.
    pub fn look(&mut self, world: &World) {
        for (node, place) in &world.places {
            let Some(running) = &place.node else { continue };
            let looked = self.looked.entry((*node, place.runs)).or_default();
            let state = {
                let replica = running.member.consensus.replica();
                let state = replica.state();
                if state.revision() == *looked {
                    continue;
                }
                if state.revision() < *looked {
                    world.trace.wrong(format_args!("{node} goes back to revision {}", state.revision()));
                }
                state.clone()
            };
            *looked = state.revision();
            for broken in invariants::broken(&state) {
                world
                    .trace
                    .wrong(format_args!("not true on {node} at revision {}: {broken}", state.revision()));
            }
            over_capacity(world, *node, &state);
            let revision = state.revision();
            match self.states.get(&revision) {
                Some((other, theirs)) if *theirs != state => {
                    world.trace.wrong(format_args!("{node} and {other} differ at revision {revision}"));
                }
                Some(_) => {}
                None => {
                    self.states.insert(revision, (*node, state));
                    while self.states.len() > REMEMBERED {
                        self.states.pop_first();
                    }
                }
            }
        }
    }
}

/// Hosts stay as large as they are here, so nothing may ever take more than there is.
fn over_capacity(world: &World, on: NodeId, state: &State) {
    for node in state.view().nodes() {
        let Some(room) = node.info.room else { continue };
        let used = node.used;
        if used.cpu_milli > room.cpu_milli
            || used.memory_mib > room.memory_mib
            || used.disk_mib > room.disk_mib
        {
            let (id, revision) = (node.info.id, state.revision());
            let vm = |vm: &VmRecord| {
                let (phase, health) = (vm.observed.phase, vm.observed.health.as_ref().map(|h| h.state));
                let (desired, leaving) = (vm.desired, vm.upkeep.leaving);
                let (start, memory, off_plan) = (vm.start, vm.spec.memory_mib, vm.unlisted_since);
                format!(
                    "{}: {memory} MiB, start {start}, {desired:?}, {phase:?}, {health:?}, {leaving:?}, off {off_plan}",
                    vm.id
                )
            };
            let vms: Vec<String> = state.vms().filter(|vm| vm.node == id).map(|record| vm(record)).collect();
            world.trace.wrong(format_args!(
                "on {on} at revision {revision} node {id} has {room:?}, taken: {used:?} by {vms:?}"
            ));
        }
    }
}

/// It has left its node, or never had one, and no node takes it, not even when others make room.
fn waits_for_room(state: &State, vm: &VmRecord) -> bool {
    vm.upkeep.leaving.is_some_and(|leaving| leaving.released)
        && matches!(place(state.view(), &cluster::request(vm)), Decision::Refused(_))
}

/// What is missing until everything is as it shall be; `None` when nothing is.
pub fn missing(world: &World) -> Option<String> {
    let mut states: Vec<(NodeId, State)> = Vec::new();
    let mut leaders = std::collections::BTreeSet::new();
    for (node, place) in world.places.iter().filter(|(_, place)| !place.removed) {
        let Some(running) = &place.node else { return Some(format!("{node} does not run")) };
        states.push((*node, running.member.consensus.replica().state().clone()));
        leaders.insert(running.member.consensus.leader_id());
    }
    if leaders.len() != 1 || leaders.contains(&None) {
        return Some(format!("not all know the same leader: {leaders:?}"));
    }
    let (_, state) = states.first()?;
    if let Some((node, other)) = states.iter().find(|(_, other)| other != state) {
        return Some(format!(
            "{node} is at revision {}, another one at {}",
            other.revision(),
            state.revision()
        ));
    }
    let voters = world.running.all().first().map(|member| member.consensus.standing().0.len());
    let wanted = if states.len().is_multiple_of(2) { states.len() - 1 } else { states.len() }.min(5);
    if voters != Some(wanted) {
        return Some(format!("{voters:?} vote, {wanted} shall"));
    }
    for node in state.nodes() {
        if node.offer.status != NodeStatus::Up || !node.offer.leased {
            return Some(format!("{} is {:?}, leased {}", node.id, node.offer.status, node.offer.leased));
        }
    }
    let mut wanted: BTreeMap<NodeId, Vec<(blixard_api::VmId, u64)>> = BTreeMap::new();
    for vm in state.vms() {
        let phase = vm.observed.phase;
        let fits = match vm.desired {
            Desired::Running => {
                let ended = vm.has_ended() && !vm.restarts_by_itself();
                if !ended && !waits_for_room(state, vm) {
                    wanted.entry(vm.node).or_default().push((vm.id, vm.epoch));
                }
                ended
                    || waits_for_room(state, vm)
                    || (phase == Phase::Running
                        && vm.upkeep.leaving.is_none()
                        && vm.observed.start == vm.start)
            }
            Desired::Stopped => vm.has_ended(),
            Desired::Gone => false,
        };
        if !fits {
            let (desired, leaving) = (vm.desired, vm.upkeep.leaving);
            return Some(format!(
                "{} shall be {desired:?} on {} and is {phase:?}, {leaving:?}",
                vm.id, vm.node
            ));
        }
    }
    for (node, place) in world.places.iter().filter(|(_, place)| !place.removed) {
        let runs = place.machine.host.running();
        let shall = wanted.remove(node).unwrap_or_default();
        if runs != shall {
            return Some(format!("{node} runs {runs:?}, it shall run {shall:?}"));
        }
        let listed = |id: &blixard_api::VmId| state.vm(*id).is_some_and(|vm| vm.node == *node);
        if let Some(left) = place.machine.host.known().iter().find(|id| !listed(id)) {
            return Some(format!("{node} still has {left}"));
        }
    }
    None
}
