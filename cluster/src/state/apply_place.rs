//! Commands that move VMs and start them again. A VM is never on two nodes: it is placed anew only when its node has
//! confirmed that nothing of it is left, or is down with its lease ended.

use std::sync::Arc;

use blixard_api::VmId;
use blixard_api::placement::{OnNodeLoss, RestartWhen};
use blixard_api::vm::{Desired, Phase};

use super::command::{Answer, Outcome, PLACEMENT_LEVEL, ROOM_LEVEL, Refusal};
use super::placement::{Departure, Leaving, NodeStatus, VmChange};
use super::records::{NodeId, Observed, VmRecord};
use super::{NODE_VMS_MAX, PLAN_BYTES_MAX, State};
use crate::scheduler::{self, Reason, cluster};

/// Most nodes that a VM avoids; the oldest is tried again then.
const AVOID_MAX: usize = 64;

impl State {
    pub(super) fn change_vm(&mut self, id: VmId, epoch: u64, change: &VmChange, now_ms: u64) -> Outcome {
        let vm = self.vms.get(&id).ok_or(Refusal::NoVm)?;
        if vm.epoch != epoch {
            return Err(Refusal::Epoch { now: vm.epoch });
        }
        let vm = vm.as_ref().clone();
        match change {
            VmChange::Evict { why: Departure::Unhealthy, grace_ms } => self.evict_unhealthy(vm, *grace_ms),
            VmChange::Evict { why, grace_ms } => self.evict(vm, *why, *grace_ms),
            VmChange::Refused { start } => self.refused(vm, *start),
            VmChange::Released => self.release(vm),
            VmChange::Place { node } => self.place(vm, *node),
            VmChange::Restart { start } => self.restart(vm, *start),
            VmChange::Unhealthy { start } => self.unhealthy(vm, *start, now_ms),
        }
    }

    /// Whether every member places VMs by what nodes offer: otherwise some of them would apply the same entry differently.
    pub fn places(&self) -> bool {
        self.cluster.as_ref().is_some_and(|cluster| cluster.feature_level >= PLACEMENT_LEVEL)
    }

    /// Whether every member knows that a VM keeps its room until it is started again, and that no VM goes where nobody has told
    /// what there is.
    pub(super) fn keeps_room(&self) -> bool {
        self.cluster.as_ref().is_some_and(|cluster| cluster.feature_level >= ROOM_LEVEL)
    }

    pub(super) fn unchanged(vm: VmRecord) -> Outcome {
        Ok(Answer::Vm { vm: Arc::new(vm), created: false })
    }

    pub(super) fn changed_vm(&mut self, vm: VmRecord) -> Outcome {
        Ok(Answer::Vm { vm: self.put_vm(vm), created: false })
    }

    fn evict(&mut self, mut vm: VmRecord, why: Departure, grace_ms: u64) -> Outcome {
        if !vm.can_be_moved() {
            return Self::unchanged(vm);
        }
        vm.upkeep.leaving = Some(Leaving { why, grace_ms, released: false });
        self.touch_plan(vm.node);
        self.changed_vm(vm)
    }

    /// Whether a VM that its node refuses to start goes elsewhere: unless its disk may have something on it that it waits
    /// for, or nobody else is left.
    pub fn goes_elsewhere(&self, vm: &VmRecord, start: u64) -> bool {
        // Each placement brings one start: there was no other one.
        let never_ran = vm.start <= vm.epoch;
        let waits = vm.spec.placement.on_node_loss == OnNodeLoss::Wait && !never_ran;
        let current = vm.start == start && vm.desired == Desired::Running && vm.unlisted_since == 0;
        current
            && !waits
            && self.nodes.values().any(|node| {
                let takes = node.offer.status == NodeStatus::Up && !node.cordoned;
                takes && node.id != vm.node && !vm.upkeep.avoid.contains(&node.id)
            })
    }

    fn refused(&mut self, mut vm: VmRecord, start: u64) -> Outcome {
        if !self.goes_elsewhere(&vm, start) {
            return Self::unchanged(vm);
        }
        avoid(&mut vm);
        vm.upkeep.leaving = Some(Leaving { why: Departure::Refused, grace_ms: 0, released: false });
        vm.observed = Observed::nothing(vm.observed.start);
        vm.unlisted_since = self.touch_plan(vm.node);
        self.changed_vm(vm)
    }

    fn release(&mut self, mut vm: VmRecord) -> Outcome {
        let off_plan = vm.unlisted_since > 0 && vm.desired != Desired::Gone;
        match &mut vm.upkeep.leaving {
            Some(leaving) if off_plan && !leaving.released => leaving.released = true,
            _ => return Self::unchanged(vm),
        }
        self.changed_vm(vm)
    }

    fn place(&mut self, mut vm: VmRecord, node: NodeId) -> Outcome {
        if vm.desired == Desired::Gone {
            return Err(Refusal::Leaving(vm.name));
        }
        if !self.may_be_placed(&vm) {
            return Err(Refusal::NotReleased(vm.name));
        }
        self.has_room(&vm, node)?;
        let left = vm.node;
        self.unindex(&vm);
        vm.node = node;
        vm.epoch = vm.epoch.saturating_add(1);
        vm.upkeep.leaving = None;
        vm.unlisted_since = 0;
        vm.upkeep.unhealthy_starts = 0;
        if vm.desired == Desired::Running {
            vm.start = vm.start.saturating_add(1);
        }
        vm.observed = Observed::nothing(vm.observed.start);
        self.index(&vm);
        self.touch_plan(left);
        self.touch_plan(node);
        self.changed_vm(vm)
    }

    /// Nothing of it can run where it was: its node said so, or is down and freezes it until it knows better. What has ended,
    /// or shall not run, stays on a node that is down, with its disk.
    pub fn may_be_placed(&self, vm: &VmRecord) -> bool {
        if vm.desired == Desired::Gone {
            return false;
        }
        if vm.upkeep.leaving.is_some_and(|leaving| leaving.released) {
            return true;
        }
        let runs = vm.desired == Desired::Running && (!vm.has_ended() || vm.restarts_by_itself());
        runs && vm.spec.placement.on_node_loss == OnNodeLoss::Restart
            && self.nodes.get(&vm.node).is_some_and(|node| {
                node.offer.status == NodeStatus::Down && (node.offer.leased || node.offer.vouched)
            })
    }

    /// Whether the node takes this VM: the last check, after all planners.
    pub(super) fn has_room(&self, vm: &VmRecord, node: NodeId) -> Result<(), Refusal> {
        let record = self.nodes.get(&node).ok_or(Refusal::NoNode(node))?;
        let request = scheduler::Request { untold: !self.keeps_room(), ..cluster::request(vm) };
        if let Some(reason) = scheduler::refuses(&self.view, &request, node).filter(|_| self.places()) {
            let why = scheduler::Explanation::words(reason, &vm.spec.placement);
            return Err(Refusal::NoRoom { node: record.name.clone(), why });
        }
        if self.node_vms.get(&node).copied().unwrap_or(0) >= NODE_VMS_MAX {
            return Err(Refusal::TooMany(NODE_VMS_MAX));
        }
        let bytes = self.plan_bytes.get(&node).copied().unwrap_or(0);
        if bytes.saturating_add(super::vm_plan_bytes(vm)) > PLAN_BYTES_MAX {
            return Err(Refusal::PlanFull);
        }
        Ok(())
    }

    /// Whether a VM that has ended finds room where it is when it is started again.
    pub(super) fn has_room_again(&self, vm: &VmRecord) -> Result<(), Refusal> {
        let Some(node) = self.view.node(vm.node) else { return Ok(()) };
        let own = node.vms.get(&vm.id).map(|placed| placed.size).unwrap_or_default();
        let short = node.short_of(cluster::size(&vm.spec), own).map(Reason::Room);
        let devices =
            (!node.has_accelerators(&vm.spec.placement.accelerators)).then_some(Reason::Accelerators);
        match short.or(devices) {
            Some(reason) => {
                let why = scheduler::Explanation::words(reason, &vm.spec.placement);
                Err(Refusal::NoRoom { node: node.info.name.clone(), why })
            }
            None => Ok(()),
        }
    }

    fn restart(&mut self, mut vm: VmRecord, start: u64) -> Outcome {
        if vm.start != start || !vm.restarts_by_itself() {
            return Self::unchanged(vm);
        }
        self.has_room_again(&vm)?;
        let ran = vm
            .observed
            .ended_at_ms
            .zip(vm.observed.started_at_ms)
            .map(|(end, begin)| end.saturating_sub(begin));
        let steady = ran.is_some_and(|ms| ms >= vm.spec.restart.backoff_max_ms);
        vm.upkeep.restarts = if steady { 1 } else { vm.upkeep.restarts.saturating_add(1) };
        self.start_anew(vm)
    }

    pub(super) fn start_anew(&mut self, mut vm: VmRecord) -> Outcome {
        vm.start = vm.start.saturating_add(1);
        vm.observed = Observed::nothing(vm.observed.start);
        self.touch_plan(vm.node);
        self.changed_vm(vm)
    }

    /// What a report about a VM that leaves means: once it has ended it goes off the plan, and does not look ended.
    pub(super) fn note_departure(&mut self, vm: &mut VmRecord) {
        if vm.upkeep.leaving.is_none() || vm.unlisted_since > 0 || !vm.has_ended() {
            return;
        }
        vm.unlisted_since = self.touch_plan(vm.node);
        if vm.desired == Desired::Running {
            let reason = Some("it waits for another node".to_owned());
            vm.observed = Observed { reason, ..Observed::nothing(vm.observed.start) };
        }
    }

    /// All records are loaded: the scheduler's view is made of them.
    pub fn loaded(&mut self) {
        self.view = scheduler::View::default();
        for node in self.nodes.values() {
            self.view.set_node(cluster::node_info(node));
        }
        let keeps = self.keeps_room();
        for vm in self.vms.values() {
            cluster::put(&mut self.view, vm, keeps);
        }
    }
}

/// The VM does not come back to the node where it is.
pub(super) fn avoid(vm: &mut VmRecord) {
    let node = vm.node;
    vm.upkeep.avoid.retain(|known| *known != node);
    vm.upkeep.avoid.push(node);
    if vm.upkeep.avoid.len() > AVOID_MAX {
        vm.upkeep.avoid.remove(0);
    }
}

impl VmRecord {
    /// It may be stopped where it is and placed anew, with a new disk: it runs and does not wait for its node.
    pub fn can_be_moved(&self) -> bool {
        self.desired == Desired::Running
            && !self.has_ended()
            && self.upkeep.leaving.is_none()
            && self.spec.placement.on_node_loss == OnNodeLoss::Restart
    }

    /// It has ended, shall run, and its restart policy says that it is started again.
    pub fn restarts_by_itself(&self) -> bool {
        if self.desired != Desired::Running || !self.has_ended() || self.upkeep.leaving.is_some() {
            return false;
        }
        let failed = self.observed.phase == Phase::Failed
            || self
                .observed
                .workload
                .is_some_and(|exit| exit != blixard_vmm_api::guest::WorkloadExit::Code(0));
        let wanted = match self.spec.restart.when {
            RestartWhen::Never => false,
            RestartWhen::OnFailure => failed,
            RestartWhen::Always => true,
        };
        wanted && self.spec.restart.limit.is_none_or(|limit| self.upkeep.restarts < limit)
    }
}

#[cfg(test)]
#[path = "apply_place_test.rs"]
mod tests;
