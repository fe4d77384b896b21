//! Restarts and moves of VMs that do not become healthy.

use blixard_api::health::Health;
use blixard_api::placement::{OnNodeLoss, Restart};

use super::super::placement::VmChange;
use super::super::testing::{Cluster, create, id};
use super::super::{Command, Observed, Refusal};
use super::*;

fn with_check(when: RestartWhen, edit: impl FnOnce(&mut VmRecord)) -> Cluster {
    let mut cluster = Cluster::with_nodes(16, 2);
    let Command::CreateVm { id, project, name, mut spec, node, waits } = create(1, "a") else { panic!() };
    spec.restart = Restart { when, ..Restart::default() };
    spec.health = Some(serde_json::from_str(r#"{"command":["ok"]}"#).unwrap());
    let mut probe = cluster.vm(Command::CreateVm { id, project, name, spec, node, waits });
    assert_eq!(probe.health.as_ref().map(|check| check.retries), Some(3));
    edit(&mut probe);
    let restored = std::sync::Arc::new(probe);
    cluster.state.vms.insert(id, restored);
    cluster.state.loaded();
    cluster
}

fn told(cluster: &Cluster, state: HealthState) -> Command {
    let vm = cluster.state.vm(id(1)).unwrap();
    let health = Some(Health { state, output: "out".into() });
    let observed = Observed { phase: Phase::Running, health, ..Observed::nothing(vm.start) };
    Command::RecordReport { id: vm.id, node: vm.node, epoch: vm.epoch, observed: Box::new(observed) }
}

fn tell(cluster: &mut Cluster, state: HealthState) {
    let command = told(cluster, state);
    cluster.run(command).unwrap();
}

fn change(cluster: &Cluster, change: VmChange) -> Command {
    let vm = cluster.state.vm(id(1)).unwrap();
    Command::Vm { id: vm.id, epoch: vm.epoch, change }
}

/// Asks for another start; answers whether there is one.
fn restart(cluster: &mut Cluster) -> bool {
    let start = cluster.state.vm(id(1)).unwrap().start;
    let command = change(cluster, VmChange::Unhealthy { start });
    cluster.vm(command).start > start
}

fn evict(cluster: &mut Cluster) -> bool {
    let command = change(cluster, VmChange::Evict { why: Departure::Unhealthy, grace_ms: 1 });
    cluster.vm(command).upkeep.leaving.is_some()
}

#[test]
fn an_unhealthy_vm_is_started_again_once_for_each_start_and_only_by_its_policy() {
    let mut never = with_check(RestartWhen::Never, |_| ());
    tell(&mut never, HealthState::Unhealthy);
    assert!(!restart(&mut never), "as docker: it is shown and runs on");

    let mut cluster = with_check(RestartWhen::OnFailure, |_| ());
    for state in [HealthState::Starting, HealthState::Healthy] {
        tell(&mut cluster, state);
        assert!(!restart(&mut cluster), "{state}");
    }
    tell(&mut cluster, HealthState::Unhealthy);
    let late = change(&cluster, VmChange::Unhealthy { start: 1 });
    assert!(restart(&mut cluster));
    assert_eq!(cluster.vm(late).start, 2, "a second proposal about the same start changes nothing");
    assert!(!restart(&mut cluster), "nothing is known about the new start");
}

#[test]
fn a_limit_of_restarts_holds_for_health_too() {
    let limit = |vm: &mut VmRecord| vm.spec.restart.limit = Some(2);
    let mut cluster = with_check(RestartWhen::Always, limit);
    for expected in [true, true, false] {
        tell(&mut cluster, HealthState::Unhealthy);
        assert_eq!(restart(&mut cluster), expected);
    }
}

#[test]
fn a_vm_that_ran_for_long_begins_with_the_first_pause_again() {
    let mut cluster = with_check(RestartWhen::Always, |vm| vm.upkeep.restarts = 7);
    let now_ms = cluster.now_ms;
    let vm = cluster.state.vm(id(1)).unwrap().clone();
    let Command::RecordReport { id, node, epoch, mut observed } = told(&cluster, HealthState::Unhealthy)
    else {
        panic!()
    };
    observed.started_at_ms = Some(now_ms - vm.spec.restart.backoff_max_ms);
    cluster.run(Command::RecordReport { id, node, epoch, observed }).unwrap();
    assert!(restart(&mut cluster));
    assert_eq!(cluster.state.vm(id).unwrap().upkeep.restarts, 1);
}

#[test]
fn after_three_restarts_without_success_it_may_leave_and_avoids_the_node() {
    let mut cluster = with_check(RestartWhen::OnFailure, |_| ());
    for _ in 0..RESTARTS_HERE_MAX {
        tell(&mut cluster, HealthState::Unhealthy);
        assert!(!evict(&mut cluster), "not yet");
        assert!(restart(&mut cluster));
    }
    tell(&mut cluster, HealthState::Unhealthy);
    assert!(evict(&mut cluster));
    let vm = cluster.state.vm(id(1)).unwrap();
    assert_eq!((vm.upkeep.avoid.as_slice(), vm.upkeep.unhealthy_starts), ([1].as_slice(), 0));
    assert!(!restart(&mut cluster), "it leaves");
}

#[test]
fn one_success_ends_the_count_and_what_waits_for_its_node_is_never_moved() {
    let mut cluster = with_check(RestartWhen::OnFailure, |_| ());
    for _ in 0..2 {
        for _ in 0..RESTARTS_HERE_MAX {
            tell(&mut cluster, HealthState::Unhealthy);
            restart(&mut cluster);
        }
        tell(&mut cluster, HealthState::Healthy);
        tell(&mut cluster, HealthState::Unhealthy);
        assert!(!evict(&mut cluster));
    }
    let wait = |vm: &mut VmRecord| {
        vm.spec.placement.on_node_loss = OnNodeLoss::Wait;
        vm.upkeep.unhealthy_starts = RESTARTS_HERE_MAX;
    };
    let mut cluster = with_check(RestartWhen::OnFailure, wait);
    tell(&mut cluster, HealthState::Unhealthy);
    assert!(!evict(&mut cluster), "its disk is here");
    assert!(restart(&mut cluster));
}

#[test]
fn below_its_level_nothing_of_it_may_be_proposed() {
    let with = with_check(RestartWhen::Always, |_| ());
    let Command::CreateVm { id, project, name, mut spec, node, waits } = create(2, "b") else { panic!() };
    spec.health = Some(Default::default());
    let mut image = super::super::testing::image("img");
    image.config.health = Some(Default::default());
    for command in [
        Command::CreateVm { id, project, name, spec, node, waits },
        Command::PutImage(Box::new(image)),
        told(&with, HealthState::Healthy),
        change(&with, VmChange::Unhealthy { start: 1 }),
        change(&with, VmChange::Evict { why: Departure::Unhealthy, grace_ms: 0 }),
    ] {
        assert_eq!(command.level(), HEALTH_LEVEL, "{command:?}");
    }
    let unknown: Result<_, Refusal> = Cluster::at_level(16, HEALTH_LEVEL - 1).run(create(3, "c")).map(|_| ());
    unknown.unwrap();
    assert!(!Cluster::at_level(16, HEALTH_LEVEL - 1).state.checks_health());
}
