//! The leader's own work, played until there is nothing left to do.

use blixard_api::health::{Health, HealthState};
use blixard_api::placement::{OnNodeLoss, PreemptionPolicy, Restart, RestartWhen};
use blixard_api::vm::{Phase, VmSpec};

use super::*;
use crate::state::placement::{Capacity, NodeChange};
use crate::state::testing::{Cluster, create, id};
use crate::state::{Observed, Outcome};

fn cluster(nodes: u64) -> Cluster {
    let mut cluster = Cluster::with_nodes(16, nodes);
    let capacity = Capacity { cpus: 8, memory_mib: 1024, disk_mib: 100_000, arch: Default::default() };
    for node in 1..=nodes {
        cluster.run(Command::Node { node, change: NodeChange::Capacity(capacity) }).unwrap();
        cluster.run(Command::Node { node, change: NodeChange::Leased(true) }).unwrap();
    }
    cluster
}

fn make(
    cluster: &mut Cluster,
    number: u128,
    node: u64,
    waits: bool,
    edit: impl FnOnce(&mut VmSpec),
) -> Outcome {
    let Command::CreateVm { id, project, mut spec, .. } = create(number, "x") else { panic!() };
    edit(&mut spec);
    cluster.run(Command::CreateVm { id, project, name: format!("v{number}"), spec, node, waits })
}

/// Agents that do at once what their plans say.
fn agents(cluster: &mut Cluster) {
    let vms: Vec<Arc<VmRecord>> = cluster.state.vms().cloned().collect();
    for vm in vms {
        let (node, epoch) = (vm.node, vm.epoch);
        let up = cluster.state.node(node).unwrap().offer.status == NodeStatus::Up;
        if !up || vm.upkeep.leaving.is_some_and(|leaving| leaving.released) {
            continue;
        }
        if vm.unlisted_since > 0 {
            cluster.run(change(&vm, VmChange::Released)).unwrap();
            continue;
        }
        let phase = if vm.upkeep.leaving.is_some() { Phase::Stopped } else { Phase::Running };
        if vm.observed.phase != phase && !vm.has_ended() {
            let observed = Box::new(Observed { phase, ..Observed::nothing(vm.start) });
            cluster.run(Command::RecordReport { id: vm.id, node, epoch, observed }).unwrap();
        }
    }
}

/// Lets leader and agents work until nothing changes; answers where the VMs are.
fn settle(cluster: &mut Cluster) -> Vec<(u64, Phase)> {
    let mut memory = Memory::default();
    for round in 0..50 {
        let before = cluster.state.clone();
        for command in due(&cluster.state, &mut memory, round * 1000) {
            cluster.run(command).ok();
        }
        agents(cluster);
        let mut same = before.clone();
        same.advance(cluster.state.revision());
        if same == cluster.state {
            break;
        }
    }
    cluster.state.vms().map(|vm| (vm.node, vm.observed.phase)).collect()
}

#[test]
fn a_drained_node_becomes_empty_but_for_those_that_wait_for_it() {
    let mut cluster = cluster(3);
    for number in 1..=3 {
        make(&mut cluster, number, 1, false, |_| ()).unwrap();
    }
    make(&mut cluster, 4, 1, false, |spec| spec.placement.on_node_loss = OnNodeLoss::Wait).unwrap();
    settle(&mut cluster);
    cluster.run(Command::Node { node: 1, change: NodeChange::Drain { grace_ms: 5 } }).unwrap();
    let after = settle(&mut cluster);
    assert!(after[..3].iter().all(|(node, phase)| *node != 1 && *phase == Phase::Running), "{after:?}");
    assert_eq!(after[3], (1, Phase::Running));
    assert!(cluster.state.vms().take(3).all(|vm| (vm.epoch, vm.start) == (2, 2)));
}

#[test]
fn vms_of_a_node_that_is_down_run_elsewhere_and_wait_where_there_is_no_room_the_important_first() {
    let mut cluster = cluster(2);
    for number in 1..=3 {
        let priority = u16::try_from(number * 100).unwrap();
        make(&mut cluster, number, 1, false, |spec| spec.placement.priority = priority).unwrap();
    }
    for number in 4..=5 {
        make(&mut cluster, number, 2, false, |_| ()).unwrap();
    }
    settle(&mut cluster);
    cluster.lose(1).unwrap();
    let after = settle(&mut cluster);
    let nodes: Vec<u64> = after.iter().map(|(node, _)| *node).collect();
    assert_eq!(nodes, [1, 2, 2, 2, 2], "room for two more");
    // It comes back: its own VM is still placed there.
    cluster.run(Command::Node { node: 1, change: NodeChange::Clear }).unwrap();
    assert!(settle(&mut cluster).iter().all(|(_, phase)| *phase == Phase::Running));
}

#[test]
fn a_vm_that_waits_for_its_node_or_has_ended_makes_no_room_for_others() {
    let mut cluster = cluster(1);
    make(&mut cluster, 1, 1, false, |spec| {
        spec.memory_mib = 1024;
        spec.placement.priority = 0;
        spec.placement.on_node_loss = OnNodeLoss::Wait;
    })
    .unwrap();
    let important = |spec: &mut VmSpec| {
        spec.placement.priority = 1000;
        spec.placement.preemption.policy = PreemptionPolicy::LowerPriority;
    };
    make(&mut cluster, 2, 1, true, important).unwrap();
    settle(&mut cluster);
    let phases: Vec<Phase> = cluster.state.vms().map(|vm| vm.observed.phase).collect();
    assert_eq!(phases, [Phase::Running, Phase::Pending]);
}

#[test]
fn a_vm_that_waits_for_room_gets_it_when_its_victims_have_gone() {
    let mut cluster = cluster(1);
    for number in 1..=4 {
        make(&mut cluster, number, 1, false, |spec| spec.placement.priority = 100).unwrap();
    }
    settle(&mut cluster);
    let important = |spec: &mut VmSpec| {
        spec.memory_mib = 512;
        spec.placement.priority = 900;
        spec.placement.preemption.policy = PreemptionPolicy::LowerPriority;
    };
    make(&mut cluster, 9, 1, true, important).unwrap();
    settle(&mut cluster);
    let vm = cluster.state.vm(id(9)).unwrap();
    assert_eq!((vm.node, vm.observed.phase, vm.upkeep.leaving), (1, Phase::Running, None));
    let waiting = cluster.state.vms().filter(|vm| vm.upkeep.leaving.is_some()).count();
    assert_eq!(waiting, 2, "its victims wait for room");
}

#[test]
fn a_failed_vm_pauses_longer_each_time_before_it_is_started_again() {
    let mut cluster = cluster(1);
    let restart = Restart { when: RestartWhen::OnFailure, ..Restart::default() };
    make(&mut cluster, 1, 1, false, |spec| spec.restart = restart).unwrap();
    let mut memory = Memory::default();
    let mut now = 0;
    for pause in [1_000, 2_000, 4_000] {
        let vm = cluster.state.vm(id(1)).unwrap();
        let observed = Box::new(Observed { phase: Phase::Failed, ..Observed::nothing(vm.start) });
        cluster.run(Command::RecordReport { id: id(1), node: 1, epoch: 1, observed }).unwrap();
        assert!(due(&cluster.state, &mut memory, now).is_empty());
        assert!(due(&cluster.state, &mut memory, now + pause - 1).is_empty());
        now += pause;
        let commands = due(&cluster.state, &mut memory, now);
        assert_eq!(commands.len(), 1);
        cluster.run(commands[0].clone()).unwrap();
    }
    assert_eq!(cluster.state.vm(id(1)).unwrap().start, 4);
}

/// The VM says this of its health, in its newest start.
fn health(cluster: &mut Cluster, state: HealthState) {
    let vm = cluster.state.vm(id(1)).unwrap().clone();
    let health = Some(Health { state, output: String::new() });
    let observed = Box::new(Observed { phase: Phase::Running, health, ..Observed::nothing(vm.start) });
    cluster.run(Command::RecordReport { id: vm.id, node: vm.node, epoch: vm.epoch, observed }).unwrap();
}

fn with_check(spec: &mut VmSpec) {
    spec.restart = Restart { when: RestartWhen::OnFailure, ..Restart::default() };
    spec.health = Some(serde_json::from_str(r#"{"command":["ok"]}"#).unwrap());
}

#[test]
fn a_vm_that_does_not_become_healthy_is_started_again_with_longer_pauses_and_then_goes_to_another_node() {
    let mut cluster = cluster(2);
    make(&mut cluster, 1, 1, false, with_check).unwrap();
    let mut memory = Memory::default();
    let mut now = 0;
    for pause in [1_000, 2_000, 4_000] {
        health(&mut cluster, HealthState::Unhealthy);
        assert!(due(&cluster.state, &mut memory, now).is_empty());
        assert!(due(&cluster.state, &mut memory, now + pause - 1).is_empty());
        now += pause;
        let commands = due(&cluster.state, &mut memory, now);
        let start = cluster.state.vm(id(1)).unwrap().start;
        assert_eq!(commands, [change(cluster.state.vm(id(1)).unwrap(), VmChange::Unhealthy { start })]);
        cluster.run(commands[0].clone()).unwrap();
    }
    health(&mut cluster, HealthState::Unhealthy);
    due(&cluster.state, &mut memory, now);
    let commands = due(&cluster.state, &mut memory, now + 8_000);
    assert!(matches!(
        &commands[..],
        [Command::Vm { change: VmChange::Evict { why: Departure::Unhealthy, .. }, .. }]
    ));
    cluster.run(commands[0].clone()).unwrap();
    assert_eq!(settle(&mut cluster), [(2, Phase::Running)]);
    let vm = cluster.state.vm(id(1)).unwrap();
    assert_eq!((vm.epoch, vm.start, vm.upkeep.avoid.as_slice()), (2, 5, [1].as_slice()));
}

#[test]
fn where_no_other_node_takes_it_an_unhealthy_vm_is_started_again_where_it_is() {
    let mut cluster = cluster(2);
    make(&mut cluster, 1, 1, false, with_check).unwrap();
    make(&mut cluster, 2, 2, false, |spec| spec.memory_mib = 1024).unwrap();
    let mut memory = Memory::default();
    for round in 1..=6 {
        health(&mut cluster, HealthState::Unhealthy);
        due(&cluster.state, &mut memory, round * 1_000_000);
        let commands = due(&cluster.state, &mut memory, round * 1_000_000 + 300_000);
        assert!(
            matches!(&commands[..], [Command::Vm { change: VmChange::Unhealthy { .. }, .. }]),
            "{commands:?}"
        );
        cluster.run(commands[0].clone()).unwrap();
    }
    assert_eq!(cluster.state.vm(id(1)).unwrap().node, 1);
}

#[test]
fn a_vm_that_becomes_healthy_in_its_pause_is_left_alone() {
    let mut cluster = cluster(1);
    make(&mut cluster, 1, 1, false, with_check).unwrap();
    let mut memory = Memory::default();
    health(&mut cluster, HealthState::Unhealthy);
    assert!(due(&cluster.state, &mut memory, 0).is_empty());
    health(&mut cluster, HealthState::Healthy);
    assert!(due(&cluster.state, &mut memory, 10_000).is_empty());
    health(&mut cluster, HealthState::Unhealthy);
    assert!(due(&cluster.state, &mut memory, 20_000).is_empty(), "its pause begins anew");
}
