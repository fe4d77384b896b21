//! What commands do, by hand and in any order.

use std::collections::BTreeMap;

use blixard_api::vm::{Desired, Phase};
use proptest::prelude::*;

use super::super::ANSWER_KEPT_MS;
use super::super::records::{ClusterRecord, LEASE_MS, LEASES_MS};
use super::super::testing::{Cluster, blob, create, id, image, init, kernel};
use super::super::{
    Answer, Command, Key, Observed, Outcome, Proposal, RecordKey, Refusal, State, invariants,
};
use crate::liveness::Settings;

fn told(start: u64, phase: Phase) -> Observed {
    Observed { phase, guest_ready: phase == Phase::Running, ..Observed::nothing(start) }
}

fn report(number: u128, start: u64, phase: Phase) -> Command {
    Command::RecordReport { id: id(number), node: 1, epoch: 1, observed: Box::new(told(start, phase)) }
}

fn start(number: u128) -> Command {
    Command::StartVm { id: id(number), if_generation: None }
}

fn stop(number: u128, grace_ms: u64) -> Command {
    Command::StopVm { id: id(number), grace_ms, if_generation: None }
}

fn delete(number: u128, force: bool) -> Command {
    Command::DeleteVm { id: id(number), force, if_generation: None }
}

fn plan_generation(state: &State) -> u64 {
    state.node(1).unwrap().plan_generation
}

#[test]
fn a_cluster_keeps_the_length_of_leases_that_it_was_made_with_and_older_ones_have_the_default() {
    let lease_of = |command: &str| {
        let mut state = State::default();
        let command = serde_json::from_str(command).unwrap();
        state.apply(1, &Proposal { now_ms: 1, key: None, command }).unwrap();
        let record = serde_json::to_string(state.cluster().unwrap()).unwrap();
        let read: ClusterRecord = serde_json::from_str(&record).unwrap();
        assert_eq!(read, **state.cluster().unwrap());
        (Settings::of(&state).lease_ms, record)
    };
    let text = serde_json::to_string(&init(16)).unwrap();
    assert!(!text.contains("lease"), "as older programs write and read it: {text}");
    let (lease_ms, record) = lease_of(&text);
    assert_eq!(lease_ms, LEASE_MS);
    assert!(!record.contains("lease"), "{record}");
    let with =
        |lease_ms: u64| text.replacen("\"node_name\"", &format!("\"lease_ms\":{lease_ms},\"node_name\""), 1);
    assert_eq!(lease_of(&with(20_000)).0, 20_000);
    assert_eq!(lease_of(&with(1)).0, *LEASES_MS.start(), "applying never fails half way");
}

#[test]
fn a_vm_is_created_once_however_often_it_is_asked_for() {
    let mut cluster = Cluster::new(16);
    let Answer::Vm { vm: first, created: true } = cluster.run(create(1, "a")).unwrap() else { panic!() };
    let Answer::Vm { vm: second, created: false } = cluster.run(create(1, "a")).unwrap() else { panic!() };
    assert_eq!(first, second);
    assert_eq!(cluster.run(create(1, "b")), Err(Refusal::IdTaken(id(1))));
    assert_eq!(cluster.run(create(2, "a")), Err(Refusal::NameTaken { name: "a".into(), id: id(1) }));
    assert_eq!(first.workload.as_ref().unwrap().args, ["/bin/sh"]);
}

#[test]
fn the_same_name_is_free_in_another_project() {
    let mut cluster = Cluster::new(16);
    cluster.run(create(1, "a")).unwrap();
    let Command::CreateVm { spec, node, .. } = create(2, "a") else { panic!() };
    let other =
        Command::CreateVm { id: id(2), project: "other".into(), name: "a".into(), spec, node, waits: false };
    cluster.run(other).unwrap();
    assert_eq!(cluster.state.vm_named("other", "a").unwrap().id, id(2));
}

#[test]
fn what_a_vm_is_made_from_must_be_known() {
    let mut cluster = Cluster::default();
    cluster.run(init(16)).unwrap();
    assert_eq!(cluster.run(create(1, "a")), Err(Refusal::NoImage("img".into())));
    cluster.run(Command::PutImage(Box::new(image("img")))).unwrap();
    assert_eq!(cluster.run(create(1, "a")), Err(Refusal::NoKernel("default".into())));
    assert_eq!(cluster.run(init(16)), Err(Refusal::Initialised));
}

#[test]
fn a_stopped_vm_starts_anew_and_old_news_do_not_end_the_new_start() {
    let mut cluster = Cluster::new(16);
    cluster.run(create(1, "a")).unwrap();
    cluster.run(report(1, 1, Phase::Running)).unwrap();
    assert_eq!(cluster.vm(start(1)).start, 1, "it runs already");
    assert_eq!(cluster.vm(stop(1, 5)).desired, Desired::Stopped);
    cluster.run(report(1, 1, Phase::Stopped)).unwrap();
    let vm = cluster.vm(start(1));
    assert_eq!((vm.start, vm.desired, vm.observed.phase), (2, Desired::Running, Phase::Pending));
    cluster.run(report(1, 1, Phase::Stopped)).unwrap();
    assert_eq!(cluster.state.vm(id(1)).unwrap().observed.phase, Phase::Pending);
    cluster.run(report(1, 2, Phase::Running)).unwrap();
    assert_eq!(cluster.state.vm(id(1)).unwrap().observed.phase, Phase::Running);
}

#[test]
fn a_vm_whose_workload_ended_can_be_started_again() {
    let mut cluster = Cluster::new(16);
    cluster.run(create(1, "a")).unwrap();
    cluster.run(report(1, 1, Phase::Stopped)).unwrap();
    assert_eq!(cluster.state.vm(id(1)).unwrap().desired, Desired::Running);
    assert_eq!(cluster.vm(start(1)).start, 2);
}

#[test]
fn a_running_vm_is_deleted_only_by_force_and_its_name_and_address_are_free_when_it_is_gone() {
    let mut cluster = Cluster::new(16);
    cluster.run(create(1, "a")).unwrap();
    cluster.run(report(1, 1, Phase::Running)).unwrap();
    assert_eq!(cluster.run(delete(1, false)), Err(Refusal::Runs("a".into())));
    let before = plan_generation(&cluster.state);
    let vm = cluster.vm(delete(1, true));
    assert_eq!(vm.desired, Desired::Gone);
    assert!(vm.unlisted_since > before && vm.unlisted_since == plan_generation(&cluster.state));
    assert_eq!(cluster.run(start(1)), Err(Refusal::Leaving("a".into())));
    assert_eq!(cluster.run(create(2, "a")), Err(Refusal::NameTaken { name: "a".into(), id: id(1) }));
    cluster.run(Command::ForgetVm { id: id(1), epoch: 7 }).unwrap();
    assert!(cluster.state.vm(id(1)).is_some(), "another placement than this one is gone");
    cluster.run(Command::ForgetVm { id: id(1), epoch: 1 }).unwrap();
    assert!(cluster.state.vm(id(1)).is_none());
    cluster.run(create(2, "a")).unwrap();
}

#[test]
fn a_vm_that_shall_stay_is_never_forgotten() {
    let mut cluster = Cluster::new(16);
    cluster.run(create(1, "a")).unwrap();
    cluster.run(Command::ForgetVm { id: id(1), epoch: 1 }).unwrap();
    assert!(cluster.state.vm(id(1)).is_some());
}

#[test]
fn addresses_are_given_in_order_and_again_when_all_others_are_taken() {
    let mut cluster = Cluster::new(29);
    for n in 1..=5 {
        cluster.run(create(n, &format!("vm{n}"))).unwrap();
    }
    let address =
        |cluster: &Cluster, n| cluster.state.vm(id(n)).unwrap().nic.as_ref().unwrap().v4.to_string();
    assert_eq!(
        (1..=5).map(|n| address(&cluster, n)).collect::<Vec<_>>(),
        ["10.88.0.2", "10.88.0.3", "10.88.0.4", "10.88.0.5", "10.88.0.6"]
    );
    assert_eq!(cluster.run(create(6, "vm6")), Err(Refusal::NetworkFull("default".into())));
    cluster.run(delete(2, true)).unwrap();
    cluster.run(Command::ForgetVm { id: id(2), epoch: 1 }).unwrap();
    cluster.run(create(6, "vm6")).unwrap();
    assert_eq!(address(&cluster, 6), "10.88.0.3");
}

#[test]
fn who_knows_an_older_generation_is_refused() {
    let mut cluster = Cluster::new(16);
    cluster.run(create(1, "a")).unwrap();
    let stop = |generation| Command::StopVm { id: id(1), grace_ms: 1, if_generation: Some(generation) };
    assert_eq!(cluster.run(stop(7)), Err(Refusal::Generation { now: 1 }));
    assert_eq!(cluster.vm(stop(1)).generation, 2);
    assert_eq!(cluster.run(stop(1)), Err(Refusal::Generation { now: 2 }));
}

#[test]
fn an_answer_is_repeated_for_a_day_and_only_for_the_same_request() {
    let mut cluster = Cluster::new(16);
    let key = |n| Some(Key { text: "k".into(), fingerprint: blob(n).digest });
    let first = cluster.propose(create(1, "a"), key(1));
    cluster.run(stop(1, 0)).unwrap();
    assert_eq!(cluster.propose(create(1, "a"), key(1)), first, "as it was answered then");
    assert_eq!(cluster.propose(create(2, "b"), key(2)), Err(Refusal::KeyReused));
    cluster.now_ms += ANSWER_KEPT_MS;
    assert!(cluster.propose(create(2, "b"), key(2)).is_ok(), "the key is free again");
}

#[test]
fn a_refusal_is_not_kept() {
    let mut cluster = Cluster::new(16);
    let key = || Some(Key { text: "k".into(), fingerprint: blob(1).digest });
    assert_eq!(cluster.propose(start(1), key()), Err(Refusal::NoVm));
    cluster.run(create(1, "a")).unwrap();
    assert!(cluster.propose(start(1), key()).is_ok());
}

#[test]
fn content_in_use_stays() {
    let mut cluster = Cluster::new(16);
    cluster.run(create(1, "a")).unwrap();
    let in_use = Err(Refusal::InUse { vms: vec!["a".into()], more: 0 });
    assert_eq!(cluster.run(Command::DeleteImage { name: "img".into() }), in_use);
    assert_eq!(cluster.run(Command::DeleteKernel { name: "default".into() }), in_use);
    cluster.run(delete(1, true)).unwrap();
    cluster.run(Command::ForgetVm { id: id(1), epoch: 1 }).unwrap();
    let name = blob(1).digest.to_string();
    assert!(cluster.run(Command::DeleteImage { name }).is_ok(), "by digest");
    assert!(!cluster.state.needs(blob(1).digest));
}

#[test]
fn only_what_an_agent_must_know_makes_a_new_plan() {
    let mut cluster = Cluster::new(16);
    cluster.run(create(1, "a")).unwrap();
    let generation = plan_generation(&cluster.state);
    cluster.run(report(1, 1, Phase::Running)).unwrap();
    cluster.run(Command::RenameNode { node: 1, name: "other".into() }).unwrap();
    assert_eq!(plan_generation(&cluster.state), generation);
    cluster.run(stop(1, 0)).unwrap();
    assert!(plan_generation(&cluster.state) > generation);
}

#[test]
fn a_plan_that_no_agent_would_take_is_refused_before_it_exists() {
    let mut cluster = Cluster::new(16);
    let mut made = 0;
    let refused = loop {
        let Command::CreateVm { id, project, mut spec, node, .. } = create(made + 1, "x") else { panic!() };
        spec.env = [("BIG".to_owned(), "x".repeat(100_000))].into();
        let command = Command::CreateVm { id, project, name: format!("vm{made}"), spec, node, waits: false };
        match cluster.run(command) {
            Ok(_) => made += 1,
            Err(refusal) => break refusal,
        }
    };
    assert_eq!(refused, Refusal::PlanFull);
    assert!(made > 100, "{made}");
    let plan = crate::host::plan::plan_for(&cluster.state, 1, &[]).unwrap();
    assert!(serde_json::to_vec(&plan).unwrap().len() < 16 << 20);
}

/// Commands about few VMs, so that they meet.
fn commands() -> impl Strategy<Value = Vec<(Command, Option<u8>)>> {
    let number = || 1u128..6;
    let phase = prop::sample::select(vec![
        Phase::Pending,
        Phase::Preparing,
        Phase::Starting,
        Phase::Running,
        Phase::Stopping,
        Phase::Stopped,
        Phase::Failed,
    ]);
    let generation = || prop::option::weighted(0.2, 1u64..4);
    let command = prop_oneof![
        4 => (number(), "[ab]", "[pq]", prop::bool::ANY).prop_map(|(n, name, project, nic)| {
            let Command::CreateVm { id, mut spec, node, .. } = create(n, &name) else { panic!() };
            spec.network = (!nic).then(|| "none".to_owned());
            Command::CreateVm { id, project, name, spec, node, waits: false }
        }),
        2 => (number(), generation()).prop_map(|(n, if_generation)| Command::StartVm { id: id(n), if_generation }),
        2 => (number(), 0u64..3, generation()).prop_map(|(n, grace_ms, if_generation)| {
            Command::StopVm { id: id(n), grace_ms, if_generation }
        }),
        2 => (number(), prop::bool::ANY, generation()).prop_map(|(n, force, if_generation)| {
            Command::DeleteVm { id: id(n), force, if_generation }
        }),
        2 => (number(), 0u64..3).prop_map(|(n, epoch)| Command::ForgetVm { id: id(n), epoch }),
        4 => (number(), 0u64..4, phase, 0u64..3, 1u64..3).prop_map(|(n, start, phase, epoch, node)| {
            Command::RecordReport { id: id(n), node, epoch, observed: Box::new(told(start, phase)) }
        }),
        1 => "(img|other)".prop_map(|name| Command::PutImage(Box::new(image(&name)))),
        1 => "(img|other)".prop_map(|name| Command::DeleteImage { name }),
        1 => Just(Command::PutKernel(Box::new(kernel("default")))),
        1 => Just(Command::DeleteKernel { name: "default".into() }),
        1 => Just(init(16)),
    ];
    prop::collection::vec((command, prop::option::weighted(0.3, 0u8..4)), 0..60)
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

/// Runs the commands, looks at everything after each, and answers the state and all answers.
fn run_all(commands: &[(Command, Option<u8>)]) -> (State, Vec<Outcome>) {
    let mut cluster = Cluster::new(29);
    let mut stored: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut outcomes = Vec::new();
    store(&mut cluster.state, &mut stored);
    for (command, key) in commands {
        let before = cluster.state.clone();
        let key = key.map(|n| Key { text: format!("k{n}"), fingerprint: blob(n % 2).digest });
        let keyed = key.is_some();
        let outcome = cluster.propose(command.clone(), key);
        let after = &cluster.state;
        assert_eq!(invariants::broken(after), Vec::<&str>::new());
        for vm in after.vms() {
            if let Some(old) = before.vm(vm.id) {
                assert!(vm.start >= old.start && vm.epoch >= old.epoch && vm.generation >= old.generation);
                assert!(old.desired != Desired::Gone || vm.desired == Desired::Gone, "there is no way back");
                assert_eq!(vm.nic, old.nic, "addresses stay");
                assert_eq!(vm.pins, old.pins, "what a VM was made from stays");
            }
        }
        assert!(plan_generation(after) >= plan_generation(&before));
        let plan = |state: &State| crate::host::plan::plan_for(state, 1, &[]).unwrap();
        if plan_generation(after) == plan_generation(&before) {
            assert_eq!(plan(after), plan(&before), "equal generations mean equal plans");
        }
        if outcome.is_err() && !keyed {
            let mut unchanged = before.clone();
            unchanged.advance(after.revision());
            assert_eq!(*after, unchanged, "a refusal changes nothing");
        }
        store(&mut cluster.state, &mut stored);
        outcomes.push(outcome);
    }
    let back = State::from_records(cluster.state.revision(), stored).unwrap();
    assert_eq!(back, cluster.state, "the stored records are the state");
    (cluster.state, outcomes)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn any_commands_keep_all_invariants_and_every_replica_agrees(commands in commands()) {
        let (one, answers_one) = run_all(&commands);
        let (two, answers_two) = run_all(&commands);
        prop_assert_eq!(one, two);
        prop_assert_eq!(answers_one, answers_two);
    }
}

#[test]
fn records_of_an_unknown_kind_are_refused_by_name() {
    let error = State::from_records(1, [("unknown/x".to_owned(), b"{}".to_vec())]).unwrap_err();
    assert!(error.to_string().contains("unknown/x"));
    let error = State::from_records(1, [(RecordKey::Vm(id(1)).to_string(), b"{}".to_vec())]).unwrap_err();
    assert!(error.to_string().contains("vm/"));
}
