//! A node and an agent without a host: what guests say of their health is shown, restarts a VM, and can be waited for.
#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::string_slice,
    clippy::print_stderr,
    clippy::cast_possible_truncation,
    reason = "a failed test is what these are for"
)]

mod common;

use blixard_tests::sim_agent::Manner;
use blixard_vmm_api::VmId;
use blixard_vmm_api::health::{Health, HealthState};
use common::{Node, VMS, id};
use serde_json::json;

fn vm(number: u128) -> VmId {
    id(number).parse().unwrap()
}

fn health(state: HealthState, output: &str) -> Option<Health> {
    Some(Health { state, output: output.into() })
}

#[test]
fn an_unhealthy_vm_is_started_again_and_its_health_is_shown_until_then() {
    let (node, agent) = Node::with_agent(Manner::Prompt);
    let spec = json!({
        "image": "img",
        "restart": {"when": "on_failure", "backoff_ms": 300},
        "health": {"command": ["/bin/check"], "interval_ms": 500}
    });
    let made = node.post(VMS, &json!({"id": id(1), "name": "a", "spec": spec}));
    assert_eq!(made.status, 201, "{}", made.text());
    let plan = agent.wait_for_plan(|plan| plan.vms.len() == 1).unwrap();
    let check = plan.vms[0].health.clone().unwrap();
    assert_eq!(
        (check.command.args, check.interval_ms, check.retries),
        (vec!["/bin/check".to_owned()], 500, 3)
    );

    assert!(agent.happen(vm(1), |vm| vm.health = health(HealthState::Healthy, "fine")));
    let seen = node.get(&format!("{VMS}/a?wait=healthy&timeout_ms=20000"));
    assert_eq!(seen.status, 200, "{}", seen.text());
    assert_eq!(seen.json()["health"], json!({"state": "healthy", "output": "fine"}));
    assert!(node.get("/metrics").text().contains(r#"blixard_vms_health{health="healthy"} 1"#));

    assert!(agent.happen(vm(1), |vm| vm.health = health(HealthState::Unhealthy, "exit code 1")));
    let seen = node.get(&format!("{VMS}/a?wait=unhealthy&timeout_ms=20000")).json();
    assert_eq!((&seen["phase"], &seen["health"]["state"]), (&json!("running"), &json!("unhealthy")));
    agent.wait_for_plan(|plan| plan.vms[0].start.0 == 2).expect("it is started again");
    let seen = node.get(&format!("{VMS}/a?wait=ready&timeout_ms=20000")).json();
    assert_eq!((&seen["start"], seen.get("health")), (&json!(2), None), "of the new start nothing is known");
}

#[test]
fn a_vm_without_a_restart_policy_stays_unhealthy_and_runs_on() {
    let (node, agent) = Node::with_agent(Manner::Prompt);
    for (number, name, when) in [(1, "a", "never"), (2, "b", "always")] {
        let restart = json!({"when": when, "backoff_ms": 100});
        let spec = json!({"image": "img", "health": {"command": ["/bin/check"]}, "restart": restart});
        assert_eq!(node.post(VMS, &json!({"id": id(number), "name": name, "spec": spec})).status, 201);
    }
    agent.wait_for_plan(|plan| plan.vms.len() == 2).unwrap();
    for (number, name) in [(1, "a"), (2, "b")] {
        assert!(agent.happen(vm(number), |vm| vm.health = health(HealthState::Unhealthy, "")));
        assert_eq!(node.get(&format!("{VMS}/{name}?wait=unhealthy&timeout_ms=20000")).status, 200);
    }
    // It was unhealthy before the other one, which is started again.
    agent.wait_for_plan(|plan| plan.vms[1].start.0 == 2).expect("its policy says so");
    assert_eq!(node.get(&format!("{VMS}/a")).json()["start"], 1);
}

#[test]
fn a_check_out_of_range_or_without_a_command_is_refused_by_field() {
    let node = Node::alone();
    node.add_content();
    let refused = |health: serde_json::Value| {
        let spec = json!({"image": "img", "health": health});
        let answer = node.post(VMS, &json!({"id": id(1), "name": "a", "spec": spec}));
        assert_eq!(answer.status, 422, "{}", answer.text());
        answer.details()
    };
    let pair = |field: &str, code: &str| vec![(field.to_owned(), code.to_owned())];
    assert_eq!(refused(json!({"interval_ms": 500})), pair("spec.health.command", "missing"));
    assert_eq!(
        refused(json!({"command": ["a"], "interval_ms": 1})),
        pair("spec.health.interval_ms", "out_of_range")
    );
    assert_eq!(refused(json!({"command": [""]})), pair("spec.health.command", "out_of_range"));
    let both = [pair("spec.health.cmd", "unknown"), pair("spec.health.command", "missing")].concat();
    assert_eq!(refused(json!({"cmd": ["a"]})), both);
}
