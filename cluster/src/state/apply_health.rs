//! VMs whose workload does not do its work: started again by their restart policy, and moved when that has not helped.
//!
//! A VM that ended is started again by the same policy and after the same pauses (`apply_place.rs`). When it has been started
//! again [`RESTARTS_HERE_MAX`] times on one node without having become healthy, that node counts as one that refuses it.

use blixard_api::placement::RestartWhen;
use blixard_api::vm::{Desired, Phase};
use blixard_vmm_api::health::HealthState;

use super::State;
use super::command::{HEALTH_LEVEL, Outcome};
use super::placement::{Departure, Leaving};
use super::records::VmRecord;

/// How often a VM is started again on one node without having become healthy, before it is moved.
pub const RESTARTS_HERE_MAX: u64 = 3;

impl State {
    /// Whether every member knows health checks: otherwise some of them would apply the same entry differently.
    pub fn checks_health(&self) -> bool {
        self.cluster.as_ref().is_some_and(|cluster| cluster.feature_level >= HEALTH_LEVEL)
    }

    /// The VM is unhealthy, and its pause is over.
    pub(super) fn unhealthy(&mut self, mut vm: VmRecord, start: u64, now_ms: u64) -> Outcome {
        if vm.start != start || !vm.restarts_for_health() {
            return Self::unchanged(vm);
        }
        let ran = vm.observed.started_at_ms.map(|begin| now_ms.saturating_sub(begin));
        let steady = ran.is_some_and(|ms| ms >= vm.spec.restart.backoff_max_ms);
        vm.upkeep.restarts = if steady { 1 } else { vm.upkeep.restarts.saturating_add(1) };
        vm.upkeep.unhealthy_starts = vm.upkeep.unhealthy_starts.saturating_add(1);
        self.start_anew(vm)
    }

    /// The VM has not become healthy where it is, and goes elsewhere.
    pub(super) fn evict_unhealthy(&mut self, mut vm: VmRecord, grace_ms: u64) -> Outcome {
        if !vm.leaves_for_health() {
            return Self::unchanged(vm);
        }
        super::apply_place::avoid(&mut vm);
        vm.upkeep.unhealthy_starts = 0;
        vm.upkeep.leaving = Some(Leaving { why: Departure::Unhealthy, grace_ms, released: false });
        self.touch_plan(vm.node);
        self.changed_vm(vm)
    }
}

impl VmRecord {
    /// Its workload does not do its work in the newest start, and its restart policy says that it is started again.
    pub fn restarts_for_health(&self) -> bool {
        let observed = &self.observed;
        let ill = observed.health.as_ref().is_some_and(|health| health.state == HealthState::Unhealthy);
        let here =
            self.desired == Desired::Running && self.unlisted_since == 0 && self.upkeep.leaving.is_none();
        here && ill
            && observed.start == self.start
            && observed.phase == Phase::Running
            && self.spec.restart.when != RestartWhen::Never
            && self.spec.restart.limit.is_none_or(|limit| self.upkeep.restarts < limit)
    }

    /// It was started again often enough where it is, without having become healthy.
    pub fn leaves_for_health(&self) -> bool {
        self.restarts_for_health() && self.can_be_moved() && self.upkeep.unhealthy_starts >= RESTARTS_HERE_MAX
    }
}

#[cfg(test)]
#[path = "apply_health_test.rs"]
mod tests;
