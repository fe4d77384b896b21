//! What the leader does by itself: VMs that have no node are placed, drained nodes are emptied, VMs that ended are started
//! again. Level-triggered: what is to be done follows from the replicated state, so a new leader goes on where the old one was,
//! and doing it twice changes nothing (each command names the placement or start that it is about).

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use blixard_api::VmId;
use blixard_api::vm::{Desired, grace_default};
use futures::StreamExt;
use tokio_util::sync::CancellationToken;

use crate::raft::Consensus;
use crate::scheduler::{Decision, Request, cluster, place};
use crate::state::placement::{Departure, VmChange};
use crate::state::{Command, NodeId, NodeStatus, Proposal, State, VmRecord};

/// Least time between two looks: many changes are one look.
const LOOK_PAUSE: Duration = Duration::from_millis(100);
/// Longest time between two looks: a pause before a restart ends without any change of the state.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// Most VMs of one node that leave it for a drain at the same time.
const LEAVING_MAX: usize = 16;
/// Most commands of one look.
const COMMANDS_MAX: usize = 1024;
/// Proposals that are under way at once.
const PROPOSALS_AT_ONCE: usize = 256;

/// What is remembered between two looks. Nothing is lost with it but the part of a pause that has passed.
#[derive(Debug, Default)]
pub struct Memory {
    /// When the end of a start was seen, by VM: start and milliseconds of CLOCK_MONOTONIC.
    ended: BTreeMap<VmId, (u64, u64)>,
}

/// What is to be done now. Pure but for what `memory` remembers.
pub fn due(state: &State, memory: &mut Memory, now_ms: u64) -> Vec<Command> {
    // Before, some members would not know what to do.
    if !state.places() {
        return Vec::new();
    }
    let mut commands = placements(state);
    commands.extend(drains(state));
    commands.extend(restarts(state, memory, now_ms));
    commands.truncate(COMMANDS_MAX);
    commands
}

fn change(vm: &VmRecord, change: VmChange) -> Command {
    Command::Vm { id: vm.id, epoch: vm.epoch, change }
}

/// VMs without a node, the most important first, then the oldest. Each sees what was decided for those before it.
fn placements(state: &State) -> Vec<Command> {
    let mut waiting: Vec<&Arc<VmRecord>> = state.vms().filter(|vm| state.may_be_placed(vm)).collect();
    if waiting.is_empty() {
        return Vec::new();
    }
    waiting.sort_by_key(|vm| (Reverse(vm.spec.placement.priority), vm.id));
    let mut view = state.view().clone();
    let mut commands = Vec::new();
    for vm in waiting {
        if commands.len() >= COMMANDS_MAX {
            break;
        }
        // Members of its groups must not be kept away by the VM itself, which may still count where it was.
        view.take(vm.node, vm.id);
        let Decision::Place { node, victims } = place(&view, &cluster::request(vm)) else { continue };
        if victims.is_empty() {
            commands.push(change(vm, VmChange::Place { node }));
            view.put(node, cluster::placed_whole(vm));
            continue;
        }
        let grace_ms = vm.spec.placement.preemption.grace_ms;
        for victim in victims.iter().filter_map(|id| state.vm(*id)) {
            // Gone for those that come after: nobody else needs to stop them.
            view.take(node, victim.id);
            if victim.upkeep.leaving.is_none() {
                commands.push(change(victim, VmChange::Evict { why: Departure::Preempted, grace_ms }));
            }
        }
        view.put(node, cluster::placed_whole(vm));
    }
    commands
}

/// VMs of drained nodes that may go elsewhere, some at a time.
fn drains(state: &State) -> Vec<Command> {
    let draining: BTreeMap<NodeId, u64> = state
        .nodes()
        .filter(|node| node.offer.status == NodeStatus::Up)
        .filter_map(|node| Some((node.id, node.offer.drain_grace_ms?)))
        .collect();
    if draining.is_empty() {
        return Vec::new();
    }
    let mut leaving: BTreeMap<NodeId, usize> = BTreeMap::new();
    let here = || state.vms().filter(|vm| draining.contains_key(&vm.node) && vm.desired != Desired::Gone);
    let unfinished = |vm: &VmRecord| vm.upkeep.leaving.is_some_and(|leaving| !leaving.released);
    for vm in here().filter(|vm| unfinished(vm)) {
        *leaving.entry(vm.node).or_default() += 1;
    }
    let mut commands = Vec::new();
    for vm in here().filter(|vm| vm.can_be_moved()) {
        let under_way = leaving.entry(vm.node).or_default();
        if let Some(grace_ms) = draining.get(&vm.node).filter(|_| *under_way < LEAVING_MAX) {
            *under_way += 1;
            commands.push(change(vm, VmChange::Evict { why: Departure::Drained, grace_ms: *grace_ms }));
        }
    }
    commands
}

/// VMs that have ended or are unhealthy, are started again by their policy, and have paused for long enough.
fn restarts(state: &State, memory: &mut Memory, now_ms: u64) -> Vec<Command> {
    let mut commands = Vec::new();
    let mut ended = BTreeMap::new();
    let due = |vm: &VmRecord| (vm.restarts_by_itself() && vm.unlisted_since == 0) || vm.restarts_for_health();
    for vm in state.vms().filter(|vm| due(vm)) {
        let seen = memory.ended.get(&vm.id).filter(|(start, _)| *start == vm.start);
        let (_, seen_ms) = seen.copied().unwrap_or((vm.start, now_ms));
        ended.insert(vm.id, (vm.start, seen_ms));
        if now_ms.saturating_sub(seen_ms) >= vm.spec.restart.pause_ms(vm.upkeep.restarts) {
            commands.push(change(
                vm,
                if vm.has_ended() { VmChange::Restart { start: vm.start } } else { ill(state, vm) },
            ));
        }
    }
    memory.ended = ended;
    commands
}

/// What becomes of a VM that is unhealthy: another start, or another node, when enough starts have not helped and there is one.
fn ill(state: &State, vm: &VmRecord) -> VmChange {
    if vm.leaves_for_health() {
        let avoid = [vm.upkeep.avoid.as_slice(), &[vm.node]].concat();
        let elsewhere = Request { avoid: &avoid, ..cluster::request(vm) };
        let mut view = state.view().clone();
        view.take(vm.node, vm.id);
        if matches!(place(&view, &elsewhere), Decision::Place { victims, .. } if victims.is_empty()) {
            return VmChange::Evict { why: Departure::Unhealthy, grace_ms: grace_default() };
        }
    }
    VmChange::Unhealthy { start: vm.start }
}

/// Does it, for as long as this node leads, until `stop`.
pub async fn run(consensus: Consensus, stop: CancellationToken) {
    let work = async {
        let mut memory = Memory::default();
        let mut revisions = consensus.replica().revisions();
        loop {
            revisions.mark_unchanged();
            if consensus.leads() {
                let commands =
                    due(&consensus.replica().state(), &mut memory, consensus.clock().monotonic_us() / 1000);
                // They go into the log in this order, the important first; one flush is for many of them.
                let proposals = futures::stream::iter(commands).map(|command| propose(&consensus, command));
                proposals.buffered(PROPOSALS_AT_ONCE).for_each(async |()| ()).await;
            }
            tokio::time::sleep(LOOK_PAUSE).await;
            if tokio::time::timeout(LOOK_AGAIN, revisions.changed())
                .await
                .is_ok_and(|changed| changed.is_err())
            {
                return;
            }
        }
    };
    stop.run_until_cancelled(work).await;
}

async fn propose(consensus: &Consensus, command: Command) {
    let kind = command.kind();
    let proposal = Proposal { now_ms: consensus.clock().now_ms(), key: None, command };
    match consensus.propose(proposal).await {
        Ok((_, Ok(_))) => {}
        // Something has changed since: the next look sees it.
        Ok((_, Err(refusal))) => tracing::debug!("{kind}: {refusal}"),
        Err(error) => tracing::debug!("cannot propose {kind}: {error}"),
    }
}

#[cfg(test)]
#[path = "upkeep_test.rs"]
mod tests;
