//! Moves, lost nodes and restarts, by hand and in any order.

use std::collections::BTreeMap;

use blixard_api::health::{Health, HealthState};
use blixard_api::placement::{AntiAffinity, Restart, Scope};
use blixard_api::vm::VmSpec;
use proptest::prelude::*;

use super::super::placement::{Capacity, NodeChange, NodePolicy};
use super::super::testing::{Cluster, create, id};
use super::super::{Command, MemberCommand, NodeRecord, Proposal, invariants};
use super::*;

/// A cluster of these nodes, each with 8 processors and 1024 MiB; node 1 is the first.
fn cluster(nodes: u64) -> Cluster {
    let mut cluster = Cluster::with_nodes(16, nodes);
    let capacity = Capacity { cpus: 8, memory_mib: 1024, disk_mib: 100_000, arch: Default::default() };
    for node in 1..=nodes {
        cluster.run(node_change(node, NodeChange::Capacity(capacity))).unwrap();
        cluster.run(node_change(node, NodeChange::Leased(true))).unwrap();
    }
    cluster
}

fn node_change(node: NodeId, change: NodeChange) -> Command {
    Command::Node { node, change }
}

fn vm_change(number: u128, epoch: u64, change: VmChange) -> Command {
    Command::Vm { id: id(number), epoch, change }
}

fn create_on(number: u128, node: NodeId, edit: impl FnOnce(&mut VmSpec)) -> Command {
    let Command::CreateVm { id, project, name, mut spec, .. } = create(number, &format!("v{number}")) else {
        panic!()
    };
    edit(&mut spec);
    Command::CreateVm { id, project, name, spec, node, waits: false }
}

fn report(number: u128, node: NodeId, epoch: u64, start: u64, phase: Phase) -> Command {
    let observed = Box::new(Observed { phase, ..Observed::nothing(start) });
    Command::RecordReport { id: id(number), node, epoch, observed }
}

fn listed(cluster: &Cluster, node: NodeId) -> Vec<VmId> {
    let plan = crate::host::plan::plan_for(&cluster.state, node, &[]).unwrap();
    plan.vms.iter().map(|vm| vm.vm).collect()
}

#[test]
fn a_node_takes_no_more_than_it_has_and_a_stopped_vm_leaves_its_memory_to_others() {
    let mut cluster = cluster(1);
    for number in 1..=4 {
        cluster.run(create_on(number, 1, |_| ())).unwrap();
    }
    let refused = cluster.run(create_on(5, 1, |_| ()));
    assert!(matches!(refused, Err(Refusal::NoRoom { .. })), "{refused:?}");
    cluster.run(report(1, 1, 1, 1, Phase::Stopped)).unwrap();
    cluster.run(create_on(5, 1, |_| ())).unwrap();
    let again = cluster.run(Command::StartVm { id: id(1), if_generation: None });
    assert!(matches!(again, Err(Refusal::NoRoom { .. })), "{again:?}");
    let policy = NodePolicy { memory_percent: 200, ..NodePolicy::default() };
    cluster.run(node_change(1, NodeChange::Policy(Box::new(policy)))).unwrap();
    assert!(cluster.run(Command::StartVm { id: id(1), if_generation: None }).is_ok(), "overcommitted");
}

#[test]
fn a_vm_that_is_started_again_keeps_its_room_until_then_and_makes_none_for_others() {
    let again = |limit| {
        move |spec: &mut VmSpec| {
            spec.memory_mib = 1024;
            spec.restart.when = RestartWhen::Always;
            spec.restart.limit = limit;
        }
    };
    let small = |spec: &mut VmSpec| spec.placement.priority = 900;
    let mut full = cluster(1);
    full.run(create_on(1, 1, again(None))).unwrap();
    full.run(report(1, 1, 1, 1, Phase::Failed)).unwrap();
    let refused = full.run(create_on(2, 1, small));
    assert!(matches!(refused, Err(Refusal::NoRoom { .. })), "{refused:?}");
    assert!(full.state.view().node(1).unwrap().by_priority.is_empty(), "it cannot be stopped for others");
    full.run(vm_change(1, 1, VmChange::Restart { start: 1 })).unwrap();
    assert_eq!(full.state.vm(id(1)).unwrap().start, 2);
    full.run(report(1, 1, 1, 2, Phase::Running)).unwrap();
    assert_eq!(full.state.view().node(1).unwrap().by_priority.len(), 1);

    let mut ended = cluster(1);
    ended.run(create_on(1, 1, again(Some(0)))).unwrap();
    ended.run(report(1, 1, 1, 1, Phase::Failed)).unwrap();
    ended.run(create_on(2, 1, small)).unwrap();

    // Older members let others have it; from the entry on that raises the level all do the same again.
    let mut older = Cluster::at_level(16, ROOM_LEVEL - 1);
    older.run(create_on(1, 1, again(None))).unwrap();
    older.run(report(1, 1, 1, 1, Phase::Failed)).unwrap();
    let used = |cluster: &Cluster| cluster.state.view().node(1).unwrap().used.memory_mib;
    assert_eq!(used(&older), 0);
    let raise = MemberCommand::RaiseLevel { level: ROOM_LEVEL, node: 1, knows: ROOM_LEVEL };
    older.run(Command::Member(Box::new(raise))).unwrap();
    assert_eq!(used(&older), 1024);
    assert_eq!(invariants::broken(&older.state), Vec::<&str>::new());
}

#[test]
fn a_vm_that_is_moved_is_stopped_taken_off_the_plan_confirmed_and_only_then_placed() {
    let mut cluster = cluster(2);
    cluster.run(create_on(1, 1, |_| ())).unwrap();
    cluster.run(report(1, 1, 1, 1, Phase::Running)).unwrap();
    let place = || vm_change(1, 1, VmChange::Place { node: 2 });
    assert!(matches!(cluster.run(place()), Err(Refusal::NotReleased(_))));
    cluster.run(vm_change(1, 1, VmChange::Evict { why: Departure::Drained, grace_ms: 7 })).unwrap();
    assert_eq!(listed(&cluster, 1), [id(1)], "it has time to end");
    assert!(matches!(cluster.run(place()), Err(Refusal::NotReleased(_))));
    cluster.run(report(1, 1, 1, 1, Phase::Stopped)).unwrap();
    assert!(listed(&cluster, 1).is_empty());
    assert_eq!(
        cluster.state.vm(id(1)).unwrap().observed.phase,
        Phase::Pending,
        "it has not ended for its user"
    );
    assert!(matches!(cluster.run(place()), Err(Refusal::NotReleased(_))), "its node may still have it");
    cluster.run(vm_change(1, 1, VmChange::Released)).unwrap();
    let vm = cluster.vm(place());
    assert_eq!((vm.node, vm.epoch, vm.start), (2, 2, 2));
    assert_eq!(listed(&cluster, 2), [id(1)]);
    assert!(matches!(cluster.run(place()), Err(Refusal::Epoch { now: 2 })), "once");
    cluster.run(report(1, 1, 1, 1, Phase::Failed)).unwrap();
    assert_eq!(cluster.state.vm(id(1)).unwrap().observed.phase, Phase::Pending, "the old node is not heard");
}

#[test]
fn vms_of_a_lost_node_go_elsewhere_unless_they_wait_or_their_agent_enforces_no_lease() {
    let mut cluster = cluster(3);
    cluster.run(create_on(1, 2, |_| ())).unwrap();
    cluster.run(create_on(2, 2, |spec| spec.placement.on_node_loss = OnNodeLoss::Wait)).unwrap();
    let down = |suspicion| node_change(2, NodeChange::Down { suspicion, settled: None });
    assert_eq!(cluster.run(down(0)), Err(Refusal::NotSuspected(2)));
    cluster.run(node_change(2, NodeChange::Suspect)).unwrap();
    let before = cluster.state.node(2).unwrap().offer.suspicion;
    cluster.run(node_change(2, NodeChange::Clear)).unwrap();
    cluster.run(node_change(2, NodeChange::Suspect)).unwrap();
    assert_eq!(cluster.run(down(before)), Err(Refusal::NotSuspected(2)), "it has a lease again since then");
    assert!(matches!(
        cluster.run(vm_change(1, 1, VmChange::Place { node: 3 })),
        Err(Refusal::NotReleased(_))
    ));
    cluster.run(node_change(2, NodeChange::Leased(false))).unwrap();
    cluster.lose(2).unwrap();
    let place = |number| vm_change(number, 1, VmChange::Place { node: 3 });
    assert!(matches!(cluster.run(place(1)), Err(Refusal::NotReleased(_))));
    cluster.run(node_change(2, NodeChange::ForceDown)).unwrap();
    assert_eq!(cluster.vm(place(1)).node, 3, "an operator vouches for it");
    assert!(matches!(cluster.run(place(2)), Err(Refusal::NotReleased(_))));
    assert_eq!(listed(&cluster, 2), [id(2)]);
}

#[test]
fn no_more_than_a_third_of_the_nodes_is_declared_down_within_a_minute_without_an_operator() {
    let mut cluster = cluster(6);
    assert!(cluster.lose(1).is_ok() && cluster.lose(2).is_ok());
    assert_eq!(cluster.lose(3), Err(Refusal::TooManyDown { recent: 2, most: 2 }));
    assert!(cluster.run(node_change(3, NodeChange::ForceDown)).is_ok(), "an operator may");
    cluster.now_ms += super::super::apply_node::BLAST_WINDOW_MS;
    assert!(cluster.lose(4).is_ok(), "a minute later");
}

#[test]
fn a_leader_whose_clock_is_ahead_does_not_keep_the_next_one_from_declaring_nodes_down() {
    let mut cluster = cluster(6);
    let lose = |cluster: &mut Cluster, node: NodeId, settled: u64| {
        cluster.run(node_change(node, NodeChange::Suspect)).unwrap();
        let suspicion = cluster.state.node(node).unwrap().offer.suspicion;
        cluster.run(node_change(node, NodeChange::Down { suspicion, settled: Some(settled) }))
    };
    cluster.now_ms += 3_600_000;
    assert!(lose(&mut cluster, 1, 0).is_ok() && lose(&mut cluster, 2, 0).is_ok());
    cluster.now_ms -= 3_600_000;
    let of = |cluster: &Cluster, node| cluster.state.node(node).unwrap().offer.down_revision;
    let (first, second) = (of(&cluster, 1), of(&cluster, 2));
    assert_eq!(lose(&mut cluster, 3, first - 1), Err(Refusal::TooManyDown { recent: 2, most: 2 }));
    assert!(lose(&mut cluster, 3, first).is_ok(), "a minute after the first by the leader's own clock");
    assert_eq!(lose(&mut cluster, 4, first), Err(Refusal::TooManyDown { recent: 2, most: 2 }));
    assert!(lose(&mut cluster, 4, second).is_ok());
    let below = Cluster::at_level(16, super::super::command::HEALTH_LEVEL - 1);
    let down = NodeChange::Down { suspicion: 1, settled: Some(1) };
    assert_eq!(node_change(1, down).level(), super::super::command::HEALTH_LEVEL);
    assert!(!below.state.checks_health());
}

#[test]
fn a_refusal_of_the_node_leads_elsewhere_and_not_back() {
    let mut cluster = cluster(2);
    cluster.run(create_on(1, 1, |_| ())).unwrap();
    cluster.run(vm_change(1, 1, VmChange::Refused { start: 1 })).unwrap();
    cluster.run(vm_change(1, 1, VmChange::Released)).unwrap();
    let back = cluster.run(vm_change(1, 1, VmChange::Place { node: 1 }));
    assert!(matches!(back, Err(Refusal::NoRoom { .. })), "{back:?}");
    assert!(cluster.run(vm_change(1, 1, VmChange::Place { node: 2 })).is_ok());
}

#[test]
fn a_refusal_counts_for_the_newest_start_while_another_node_is_left_and_no_disk_is_lost_by_it() {
    let mut cluster = cluster(3);
    cluster.run(create_on(1, 1, |_| ())).unwrap();
    let refuse = |cluster: &mut Cluster, number, epoch, start| {
        cluster.vm(vm_change(number, epoch, VmChange::Refused { start }))
    };
    assert_eq!(refuse(&mut cluster, 1, 1, 2).upkeep.leaving, None, "about another start");
    for (epoch, node) in [(1, 2), (2, 3)] {
        refuse(&mut cluster, 1, epoch, epoch);
        cluster.run(vm_change(1, epoch, VmChange::Released)).unwrap();
        cluster.run(vm_change(1, epoch, VmChange::Place { node })).unwrap();
    }
    let last = refuse(&mut cluster, 1, 3, 3);
    assert_eq!(
        (last.upkeep.leaving, last.node),
        (None, 3),
        "nobody is left: it has failed, for its user to see"
    );
    cluster.run(report(1, 3, 3, 3, Phase::Failed)).unwrap();
    let again = cluster.vm(Command::StartVm { id: id(1), if_generation: None });
    assert!(again.upkeep.avoid.is_empty(), "from the beginning");

    cluster.run(create_on(2, 1, |spec| spec.placement.on_node_loss = OnNodeLoss::Wait)).unwrap();
    cluster.run(report(2, 1, 1, 1, Phase::Stopped)).unwrap();
    cluster.run(Command::StartVm { id: id(2), if_generation: None }).unwrap();
    assert_eq!(refuse(&mut cluster, 2, 1, 2).upkeep.leaving, None, "it waits for its disk");
    cluster.run(create_on(3, 1, |spec| spec.placement.on_node_loss = OnNodeLoss::Wait)).unwrap();
    assert!(refuse(&mut cluster, 3, 1, 1).upkeep.leaving.is_some(), "its disk was never used");
}

#[test]
fn what_has_ended_or_was_stopped_is_neither_moved_nor_run_again_when_its_node_is_drained_or_lost() {
    let mut cluster = cluster(3);
    for number in 1..=3 {
        cluster.run(create_on(number, 2, |_| ())).unwrap();
        cluster.run(report(number, 2, 1, 1, Phase::Running)).unwrap();
    }
    cluster.run(report(1, 2, 1, 1, Phase::Stopped)).unwrap();
    cluster.run(Command::StopVm { id: id(2), grace_ms: 1, if_generation: None }).unwrap();
    for number in 1..=2 {
        let evict = VmChange::Evict { why: Departure::Drained, grace_ms: 1 };
        assert_eq!(cluster.vm(vm_change(number, 1, evict)).upkeep.leaving, None);
    }
    cluster.lose(2).unwrap();
    let mut place = |number| cluster.run(vm_change(number, 1, VmChange::Place { node: 3 }));
    assert!(matches!(place(1), Err(Refusal::NotReleased(_))), "its work is done");
    assert!(matches!(place(2), Err(Refusal::NotReleased(_))), "its disk is there");
    assert!(place(3).is_ok());
    cluster.run(Command::StartVm { id: id(2), if_generation: None }).unwrap();
    assert!(cluster.run(vm_change(2, 1, VmChange::Place { node: 3 })).is_ok(), "now it shall run");
}

#[test]
fn members_of_an_older_level_apply_what_they_always_did_and_are_not_told_what_they_do_not_know() {
    let mut cluster = Cluster::at_level(16, 2);
    let capacity = Capacity { memory_mib: 1, ..Capacity::default() };
    cluster.run(node_change(1, NodeChange::Capacity(capacity))).unwrap();
    cluster.run(node_change(1, NodeChange::Suspect)).unwrap();
    cluster.run(create_on(1, 1, |_| ())).unwrap();
    cluster.run(report(1, 1, 1, 1, Phase::Stopped)).unwrap();
    assert!(
        cluster.run(Command::StartVm { id: id(1), if_generation: None }).is_ok(),
        "room is no matter yet"
    );

    let placed = |spec: &mut VmSpec| spec.placement.priority = 1;
    let restarts = |spec: &mut VmSpec| spec.restart.when = RestartWhen::Always;
    let Command::CreateVm { id, project, name, spec, node, .. } = create_on(1, 1, |_| ()) else { panic!() };
    let waits = Command::CreateVm { id, project, name, spec, node, waits: true };
    for newer in
        [create_on(1, 1, placed), create_on(1, 1, restarts), waits, node_change(1, NodeChange::Clear)]
    {
        assert_eq!(newer.level(), 3, "{newer:?}");
    }
    assert_eq!(vm_change(1, 1, VmChange::Released).level(), 3);
    assert_eq!(create_on(1, 1, |_| ()).level(), 1);
    let record = serde_json::to_string(&NodeRecord::new(1, "one")).unwrap();
    assert!(!record.contains("offer"), "{record}");
}

#[test]
fn restarts_are_counted_limited_and_forgotten_after_a_steady_run() {
    let mut cluster = cluster(1);
    let restart = Restart { when: RestartWhen::OnFailure, limit: Some(2), ..Restart::default() };
    cluster.run(create_on(1, 1, |spec| spec.restart = restart)).unwrap();
    let fail = |cluster: &mut Cluster, start: u64, ran_ms: u64| {
        let observed = Observed {
            phase: Phase::Failed,
            started_at_ms: Some(1_000),
            ended_at_ms: Some(1_000 + ran_ms),
            ..Observed::nothing(start)
        };
        cluster
            .run(Command::RecordReport { id: id(1), node: 1, epoch: 1, observed: Box::new(observed) })
            .unwrap();
        cluster.vm(vm_change(1, 1, VmChange::Restart { start }))
    };
    assert_eq!(fail(&mut cluster, 1, 10).upkeep.restarts, 1);
    assert_eq!(fail(&mut cluster, 2, 10).upkeep.restarts, 2);
    assert_eq!(fail(&mut cluster, 3, 10).start, 3, "no more");
    cluster.run(Command::StartVm { id: id(1), if_generation: None }).unwrap();
    assert_eq!(fail(&mut cluster, 4, 10).upkeep.restarts, 1, "somebody said so");
    assert_eq!(fail(&mut cluster, 5, 300_000).upkeep.restarts, 1, "it ran long enough");
    cluster.run(report(1, 1, 1, 6, Phase::Stopped)).unwrap();
    assert_eq!(cluster.vm(vm_change(1, 1, VmChange::Restart { start: 6 })).start, 6, "it did not fail");
}

#[test]
fn entries_and_records_from_before_placement_are_still_read() {
    let old = r#"{"now_ms":1,"command":{"create_vm":{"id":"01K7000000000000000000000A","project":"p","name":"n","spec":{"image":"i"},"node":1}}}"#;
    let proposal: Proposal = serde_json::from_str(old).unwrap();
    assert!(matches!(proposal.command, Command::CreateVm { waits: false, .. }));
    let node: NodeRecord = serde_json::from_str(r#"{"id":1,"name":"one","plan_generation":7}"#).unwrap();
    assert_eq!((node.offer.status, node.offer.policy.memory_percent), (NodeStatus::Up, 100));
}

fn changes() -> impl Strategy<Value = Vec<Command>> {
    let number = || 1u128..7;
    let node = || 1u64..5;
    let groups = prop::option::weighted(0.5, (0usize..2, any::<bool>()));
    let vm = prop_oneof![
        2 => Just(VmChange::Evict { why: Departure::Drained, grace_ms: 1 }),
        1 => (1u64..4).prop_map(|start| VmChange::Refused { start }),
        3 => Just(VmChange::Released),
        5 => node().prop_map(|node| VmChange::Place { node }),
        1 => (1u64..5).prop_map(|start| VmChange::Restart { start }),
        3 => (1u64..5).prop_map(|start| VmChange::Unhealthy { start }),
        1 => Just(VmChange::Evict { why: Departure::Unhealthy, grace_ms: 1 }),
    ];
    let on_node = prop_oneof![
        Just(NodeChange::Drain { grace_ms: 1 }),
        Just(NodeChange::Suspect),
        Just(NodeChange::Clear),
        (0u64..90, prop::option::of(0u64..90))
            .prop_map(|(suspicion, settled)| NodeChange::Down { suspicion, settled }),
        Just(NodeChange::ForceDown),
        any::<bool>().prop_map(NodeChange::Leased),
    ];
    let phase = prop::sample::select(vec![Phase::Running, Phase::Stopped, Phase::Failed, Phase::Preparing]);
    let command = prop_oneof![
        3 => (number(), node(), 1u32..5, groups, any::<bool>()).prop_map(|(n, node, quarter, group, waits)| {
            create_on(n, node, |spec| {
                spec.memory_mib = quarter * 256;
                spec.restart.when = RestartWhen::Always;
                spec.placement.on_node_loss = if waits { OnNodeLoss::Wait } else { OnNodeLoss::Restart };
                spec.placement.anti_affinity = group.into_iter().map(|(name, soft)| AntiAffinity {
                    group: ["g", "h"][name].into(), scope: Scope::Node, soft,
                }).collect();
            })
        }),
        8 => (number(), 1u64..4, vm).prop_map(|(n, epoch, change)| vm_change(n, epoch, change)),
        4 => (node(), on_node).prop_map(|(node, change)| node_change(node, change)),
        4 => (number(), node(), 1u64..4, 0u64..5, phase).prop_map(|(n, node, epoch, start, phase)| report(n, node, epoch, start, phase)),
        3 => (number(), node(), 1u64..4, 0u64..5, any::<bool>()).prop_map(|(n, node, epoch, start, well)| {
            let state = if well { HealthState::Healthy } else { HealthState::Unhealthy };
            let health = Some(Health { state, output: String::new() });
            let observed = Observed { phase: Phase::Running, health, ..Observed::nothing(start) };
            Command::RecordReport { id: id(n), node, epoch, observed: Box::new(observed) }
        }),
        1 => number().prop_map(|n| Command::StopVm { id: id(n), grace_ms: 1, if_generation: None }),
        1 => number().prop_map(|n| Command::StartVm { id: id(n), if_generation: None }),
        1 => number().prop_map(|n| Command::DeleteVm { id: id(n), force: true, if_generation: None }),
        1 => (number(), 1u64..4).prop_map(|(n, epoch)| Command::ForgetVm { id: id(n), epoch }),
    ];
    prop::collection::vec(command, 0..80)
}

/// Writes the changed records, as a store does.
fn store(state: &mut State, stored: &mut BTreeMap<String, Vec<u8>>) {
    for key in state.take_changed() {
        match state.record(&key).unwrap() {
            Some(value) => stored.insert(key.to_string(), value),
            None => stored.remove(&key.to_string()),
        };
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn in_any_order_epochs_only_grow_rooms_hold_and_no_vm_is_on_two_plans(commands in changes()) {
        let mut cluster = cluster(4);
        let mut stored: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        store(&mut cluster.state, &mut stored);
        for command in commands {
            let before = cluster.state.clone();
            let outcome = cluster.run(command.clone());
            let after = &cluster.state;
            prop_assert_eq!(invariants::broken(after), Vec::<&str>::new());
            let mut seen = std::collections::BTreeSet::new();
            for node in 1..=4 {
                prop_assert!(listed(&cluster, node).into_iter().all(|vm| seen.insert(vm)), "on two plans");
                let known = after.view().node(node).unwrap();
                prop_assert!(known.used.memory_mib <= 1024, "more than there is on {}", node);
            }
            for vm in after.vms() {
                let Some(old) = before.vm(vm.id) else { continue };
                prop_assert!(vm.epoch >= old.epoch && vm.start >= old.start);
                prop_assert_eq!(vm.epoch == old.epoch, vm.node == old.node || vm.epoch == old.epoch);
                if vm.node != old.node {
                    prop_assert_eq!(vm.epoch, old.epoch + 1);
                    prop_assert!(before.may_be_placed(old), "nobody gave it up");
                }
            }
            for node in 1..=4 {
                if after.node(node).unwrap().plan_generation == before.node(node).unwrap().plan_generation {
                    let plan = |state: &State| crate::host::plan::plan_for(state, node, &[]).unwrap();
                    prop_assert_eq!(plan(after), plan(&before), "equal generations mean equal plans");
                }
            }
            if outcome.is_err() {
                let mut unchanged = before.clone();
                unchanged.advance(after.revision());
                prop_assert_eq!(after, &unchanged, "a refusal changes nothing");
            }
            store(&mut cluster.state, &mut stored);
        }
        let back = State::from_records(cluster.state.revision(), stored).unwrap();
        prop_assert_eq!(invariants::broken(&back), Vec::<&str>::new());
        prop_assert_eq!(back, cluster.state, "the stored records are the state");
    }
}
