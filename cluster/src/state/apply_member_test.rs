//! Nodes join, change and leave; the feature level rises.

use super::*;
use crate::state::Command;
use crate::state::command::LEASE_LEVEL as LEVEL;
use crate::state::testing::{Cluster, create, id, tell};

/// One that this program does not know.
const HIGHER: u32 = LEVEL + 1;

fn facts(name: &str, key: &str) -> NodeFacts {
    NodeFacts {
        name: name.into(),
        address: Some("192.0.2.1:7440".parse().unwrap()),
        public_key: Some(key.into()),
        labels: [("zone".to_owned(), "a".to_owned())].into(),
        version: "1".into(),
        feature_level: LEVEL,
        trust_version: 1,
    }
}

fn member(command: MemberCommand) -> Command {
    Command::Member(Box::new(command))
}

fn join(token: &str, name: &str, key: &str) -> Command {
    member(MemberCommand::Join { token: token.into(), facts: Box::new(facts(name, key)) })
}

fn token(sha256: &str, expires_at_ms: u64) -> Command {
    let sha256 = sha256.into();
    member(MemberCommand::PutJoinToken(JoinTokenRecord { sha256, created_at_ms: 1, expires_at_ms }))
}

fn node(outcome: Outcome) -> Arc<NodeRecord> {
    match outcome.unwrap() {
        Answer::Node(node) => node,
        other => panic!("{other:?}"),
    }
}

/// A cluster with a second node.
fn two() -> Cluster {
    let mut cluster = Cluster::new(16);
    cluster.run(token("t", u64::MAX)).unwrap();
    assert_eq!(node(cluster.run(join("t", "two", "k"))).id, 2);
    cluster
}

#[test]
fn a_token_makes_one_node_and_repeating_the_request_makes_no_other() {
    let mut cluster = two();
    let again = node(cluster.run(join("t", "two", "k")));
    assert_eq!((again.id, again.labels["zone"].as_str()), (2, "a"));
    assert_eq!(cluster.run(join("t", "three", "other")), Err(Refusal::NoToken), "a stolen token");
    assert_eq!(cluster.run(join("nope", "three", "k3")), Err(Refusal::NoToken));
    assert_eq!(cluster.state.nodes().count(), 2);
}

#[test]
fn an_expired_token_makes_no_node_and_goes_when_the_next_is_made() {
    let mut cluster = Cluster::new(16);
    let now = cluster.now_ms;
    cluster.run(token("t", now)).unwrap();
    assert_eq!(cluster.run(join("t", "two", "k")), Err(Refusal::TokenExpired));
    cluster.run(token("u", now + 1)).unwrap();
    assert_eq!(cluster.run(join("t", "two", "k")), Err(Refusal::NoToken));
    assert_eq!(node(cluster.run(join("u", "two", "k"))).id, 2);
}

#[test]
fn a_name_is_that_of_one_node() {
    let mut cluster = two();
    cluster.run(token("u", u64::MAX)).unwrap();
    let taken = Err(Refusal::NodeNameTaken("two".into()));
    assert_eq!(cluster.run(join("u", "two", "k3")), taken);
    let rename = MemberCommand::Announce { node: 1, facts: Box::new(facts("two", "k1")) };
    assert_eq!(cluster.run(member(rename)), taken);
    assert_eq!(node(cluster.run(join("u", "three", "k3"))).id, 3, "the token was not used up by the refusal");
}

#[test]
fn a_removed_node_takes_its_number_along_and_leaves_with_its_last_vm_only() {
    let mut cluster = two();
    let Command::CreateVm { id: vm, project, name, spec, .. } = create(1, "a") else { panic!() };
    let there = Command::CreateVm { id: vm, project, name, spec, node: 2, waits: false };
    let untold = cluster.run(there.clone());
    assert!(matches!(&untold, Err(Refusal::NoRoom { why, .. }) if why.contains("not told")), "{untold:?}");
    cluster.run(tell(2)).unwrap();
    cluster.run(there).unwrap();
    let remove = || member(MemberCommand::Remove { node: 2 });
    assert_eq!(cluster.run(remove()), Err(Refusal::InUse { vms: vec!["a".into()], more: 0 }));
    cluster.run(Command::DeleteVm { id: id(1), force: true, if_generation: None }).unwrap();
    node(cluster.run(remove()));
    assert_eq!(cluster.state.vm_count(), 0, "nobody will confirm that it is gone");
    assert_eq!(cluster.run(remove()), Err(Refusal::NoNode(2)));
    assert_eq!(cluster.run(member(MemberCommand::Remove { node: 1 })), Err(Refusal::LastNode));
    cluster.run(token("u", u64::MAX)).unwrap();
    assert_eq!(node(cluster.run(join("u", "two", "k"))).id, 3);
}

#[test]
fn the_feature_level_rises_once_every_node_knows_it() {
    let mut cluster = two();
    let raise = |knows| member(MemberCommand::RaiseLevel { level: HIGHER, node: 1, knows });
    let behind = |name: &str, knows| Err(Refusal::NodeBehind { name: name.into(), knows, wanted: HIGHER });
    assert_eq!(cluster.run(raise(LEVEL)), behind("one", LEVEL));
    assert_eq!(cluster.run(raise(HIGHER)), behind("two", LEVEL));
    let newer = NodeFacts { feature_level: HIGHER, ..facts("two", "k") };
    cluster.run(member(MemberCommand::Announce { node: 2, facts: Box::new(newer) })).unwrap();
    cluster.run(raise(HIGHER)).unwrap();
    assert_eq!(cluster.state.cluster().unwrap().feature_level, HIGHER);
    cluster.run(token("u", u64::MAX)).unwrap();
    assert_eq!(cluster.run(join("u", "old", "k4")), Err(Refusal::Level { needs: HIGHER, has: LEVEL }));
}

#[test]
fn trust_changes_step_by_step_and_for_one_cluster_only() {
    let mut cluster = Cluster::new(16);
    let trust = crate::auth::authority::begin("c", cluster.now_ms).unwrap();
    let set = |trust: &TrustRecord| member(MemberCommand::SetTrust(Box::new(trust.clone())));
    cluster.run(set(&trust)).unwrap();
    let changed = Err(Refusal::Changed("whom the nodes trust".into()));
    assert_eq!(cluster.run(set(&trust)), changed, "the same version again");
    let other = TrustRecord { version: 2, cluster: "d".into(), ..trust.clone() };
    assert_eq!(cluster.run(set(&other)), changed);
    let unsigned = TrustRecord { version: 2, signer: 1, ..trust.clone() };
    assert_eq!(cluster.run(set(&unsigned)), changed);
    cluster.run(set(&TrustRecord { version: 2, ..trust })).unwrap();
}

#[test]
fn what_is_stored_of_the_cluster_comes_back() {
    let mut cluster = two();
    let trust = crate::auth::authority::begin("c", 1).unwrap();
    cluster.run(member(MemberCommand::SetTrust(Box::new(trust)))).unwrap();
    cluster.run(token("u", u64::MAX)).unwrap();
    let api = ApiTokenRecord { name: "ci".into(), sha256: "s".into(), created_at_ms: 1, expires_at_ms: None };
    cluster.run(member(MemberCommand::PutApiToken(api))).unwrap();
    cluster.run(member(MemberCommand::Cordon { node: 2, cordoned: true })).unwrap();
    let state = &cluster.state;
    let records: Vec<_> =
        state.keys().iter().map(|key| (key.to_string(), state.record(key).unwrap().unwrap())).collect();
    let back = State::from_records(state.revision(), records).unwrap();
    assert_eq!(&back, state);
    assert!(back.node(2).unwrap().cordoned);
}
