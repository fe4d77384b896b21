//! The life of VMs through the API, with an agent that has no host.
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

use blixard_agent_api::{Phase, Run, Start};
use blixard_tests::sim_agent::{Manner, SimAgent};
use common::{Answer, Node, VMS, create, id};
use serde_json::json;

#[test]
fn a_vm_lives_from_create_to_gone() {
    let (node, agent) = Node::with_agent(Manner::Prompt);
    let made = node.post(VMS, &create(1, "web"));
    assert_eq!(made.status, 201, "{}", made.text());
    assert_eq!(node.post(VMS, &create(1, "web")).status, 200, "asked again");
    assert_eq!(made.json()["addresses"][0], "10.88.0.2");

    let ready = node.get(&format!("{VMS}/web?wait=ready&timeout_ms=20000")).json();
    assert_eq!(
        (&ready["phase"], &ready["node"], &ready["start"]),
        (&json!("running"), &json!("one"), &json!(1))
    );
    for moment in ["request_us", "applied_us", "planned_us"] {
        assert!(ready["timing"][moment].is_u64(), "{ready}");
    }
    assert!(ready["timing"]["request_us"].as_u64() <= ready["timing"]["applied_us"].as_u64());
    assert!(ready["timing"]["applied_us"].as_u64() <= ready["timing"]["planned_us"].as_u64());
    assert_eq!(ready["memory_bytes"], 64 << 20);

    let plan = agent.plan();
    assert_eq!((plan.vms.len(), plan.vms[0].start, plan.vms[0].run), (1, Start(1), Run::Running));
    assert_eq!(plan.networks[0].name, "default");
    let nic = plan.vms[0].nic.as_ref().unwrap();
    assert_eq!(nic.addresses[0], ("10.88.0.2".parse().unwrap(), 16));

    assert_eq!(node.delete(&format!("{VMS}/web")).status, 409, "it runs");
    let stopping = node.post(&format!("{VMS}/web:stop"), &json!({"grace_ms": 700}));
    assert_eq!(stopping.json()["desired"], "stopped");
    let stopped = node.get(&format!("{VMS}/web?wait=stopped")).json();
    assert_eq!(stopped["exit"]["kind"], "power_off");
    assert_eq!(agent.plan().vms[0].run, Run::Stopped { grace_ms: 700 });

    assert_eq!(node.ask("POST", &format!("{VMS}/web:start"), &[], b"").json()["start"], 2);
    assert_eq!(node.get(&format!("{VMS}/web?wait=ready")).json()["phase"], "running");

    assert_eq!(node.delete(&format!("{VMS}/web?force=true")).status, 202);
    assert_eq!(node.get(&format!("{VMS}/web?wait=gone")).status, 404);
    assert!(agent.plan().vms.is_empty());
    node.create(2, "web");
}

#[test]
fn a_vm_is_found_by_name_id_and_unambiguous_prefix() {
    let (node, _agent) = Node::with_agent(Manner::Manual);
    node.create(1, "a");
    node.create(2, "b");
    let name = |path: &str| node.get(&format!("{VMS}/{path}")).json()["name"].clone();
    assert_eq!(name("a"), "a");
    assert_eq!(name(&id(2)), "b");
    assert_eq!(name(&id(2).to_lowercase()), "b");
    assert_eq!(node.get(&format!("{VMS}/{}", &id(1)[..20])).status, 409, "both begin like this");
    assert_eq!(node.get(&format!("{VMS}/01K")).status, 404, "too short");
    assert_eq!(node.get(&format!("{VMS}/nobody")).status, 404);
    assert_eq!(node.get("/v1/projects/other/vms/a").status, 404);
}

#[test]
fn a_vm_without_a_name_is_called_after_its_id() {
    let (node, _agent) = Node::with_agent(Manner::Manual);
    let made = node.post(VMS, &json!({"id": id(7), "spec": {"image": "img"}})).json();
    assert_eq!(made["name"], format!("vm-{}", &id(7)[18..]).to_lowercase());
}

#[test]
fn lists_are_paged_in_order_of_name_and_filtered_by_labels() {
    let (node, _agent) = Node::with_agent(Manner::Manual);
    for n in 1..=7u128 {
        let tier = if n % 2 == 0 { "even" } else { "odd" };
        let body = json!({"id": id(n), "name": format!("vm{n}"), "spec": {"image": "img", "labels": {"tier": tier}}});
        assert_eq!(node.post(VMS, &body).status, 201);
    }
    let names = |answer: &Answer| -> Vec<String> {
        let items = answer.json()["items"].as_array().unwrap().clone();
        items.iter().map(|vm| vm["name"].as_str().unwrap().to_owned()).collect()
    };
    let (mut all, mut path) = (vec![], format!("{VMS}?limit=3"));
    loop {
        let page = node.get(&path);
        all.extend(names(&page));
        match page.json()["cursor"].as_str() {
            Some(cursor) => path = format!("{VMS}?limit=3&cursor={cursor}"),
            None => break,
        }
    }
    assert_eq!(all, ["vm1", "vm2", "vm3", "vm4", "vm5", "vm6", "vm7"]);
    assert_eq!(names(&node.get(&format!("{VMS}?label=tier=even"))), ["vm2", "vm4", "vm6"]);
    assert_eq!(names(&node.get("/v1/projects/nobody/vms")), Vec::<String>::new());
}

#[test]
fn a_repeated_request_gets_the_first_answer_and_another_one_with_its_key_is_refused() {
    let (node, _agent) = Node::with_agent(Manner::Prompt);
    let key = [("Idempotency-Key", "k1")];
    let body = create(1, "a").to_string();
    let first = node.ask("POST", VMS, &key, body.as_bytes());
    node.get(&format!("{VMS}/a?wait=ready"));
    let again = node.ask("POST", VMS, &key, body.as_bytes());
    assert_eq!((first.status, again.status), (201, 201));
    assert_eq!(first.json()["generation"], again.json()["generation"]);
    assert_eq!(first.revision(), again.revision());
    let other = create(2, "b").to_string();
    assert_eq!(node.ask("POST", VMS, &key, other.as_bytes()).status, 409);
    assert_eq!(node.ask("POST", VMS, &[("Idempotency-Key", "")], other.as_bytes()).status, 422);
}

#[test]
fn who_changes_what_has_changed_is_told() {
    let (node, _agent) = Node::with_agent(Manner::Prompt);
    node.create(1, "a");
    let stop = format!("{VMS}/a:stop");
    assert_eq!(node.ask("POST", &stop, &[("If-Match", "9")], b"").json()["error"], "generation_mismatch");
    assert_eq!(node.ask("POST", &stop, &[("If-Match", "\"1\"")], b"").status, 200);
    assert_eq!(node.ask("POST", &stop, &[("If-Match", "1")], b"").status, 412);
}

#[test]
fn a_client_reads_what_it_wrote() {
    let (node, _agent) = Node::with_agent(Manner::Manual);
    let made = node.post(VMS, &create(1, "a"));
    let read = node.get(&format!("{VMS}/a?min_revision={}", made.revision()));
    assert_eq!(read.status, 200);
    assert!(read.revision() >= made.revision());
    let early = node.get(&format!("{VMS}/a?min_revision={}&timeout_ms=10", made.revision() + 1000));
    assert_eq!((early.status, &early.json()["retryable"]), (408, &json!(true)));
}

#[test]
fn a_wait_ends_with_the_moment_or_with_the_time() {
    let (node, agent) = Node::with_agent(Manner::Manual);
    node.create(1, "a");
    let late = node.get(&format!("{VMS}/a?wait=ready&timeout_ms=50"));
    assert_eq!(late.status, 408);
    assert!(late.json()["message"].as_str().unwrap().contains("pending"), "{}", late.text());
    agent.wait_for_plan(|plan| plan.vms.len() == 1).unwrap();
    std::thread::scope(|scope| {
        let wait = scope.spawn(|| node.get(&format!("{VMS}/a?wait=ready,failed&timeout_ms=20000")));
        let vm = agent.plan().vms[0].vm;
        agent.happen(vm, |vm| {
            vm.start = Start(1);
            vm.phase = Phase::Failed;
            vm.reason = Some("no such file: /bin/app".into());
        });
        let failed = wait.join().unwrap().json();
        assert_eq!(
            (&failed["phase"], &failed["reason"]),
            (&json!("failed"), &json!("no such file: /bin/app"))
        );
    });
}

#[test]
fn a_deleted_vm_stays_until_its_agent_has_removed_it() {
    let (node, agent) = Node::with_agent(Manner::Manual);
    node.create(1, "a");
    agent.wait_for_plan(|plan| plan.vms.len() == 1).unwrap();
    node.delete(&format!("{VMS}/a?force=true"));
    agent.wait_for_plan(|plan| plan.vms.is_empty()).unwrap();
    assert_eq!(node.get(&format!("{VMS}/a?wait=gone&timeout_ms=100")).status, 408);
    assert_eq!(node.post(VMS, &create(2, "a")).status, 409, "the name is taken");
    agent.finish_removals();
    assert_eq!(node.get(&format!("{VMS}/a?wait=gone")).status, 404);
}

#[test]
fn a_node_takes_vms_once_its_agent_has_told_what_there_is() {
    let node = Node::alone();
    node.add_content();
    assert!(node.get("/v1/nodes/one").json()["room"].is_null());
    let refused = node.post(VMS, &create(1, "a"));
    assert_eq!((refused.status, &refused.json()["error"]), (507, &json!("no_capacity")));
    assert!(refused.text().contains("has not told"), "{}", refused.text());
    assert!(refused.json()["suggestion"].as_str().unwrap().contains("blixard-agent"));
    std::thread::scope(|scope| {
        let made = scope.spawn(|| node.post(VMS, &create(2, "b")));
        node.tell();
        assert_eq!(made.join().unwrap().status, 201, "a request waits for it a little");
    });
    let used = node.get("/v1/nodes/one").json()["used"].clone();
    assert_eq!((&used["cpu_milli"], &used["memory_mib"]), (&json!(1000), &json!(256)));
}

#[test]
fn without_an_agent_a_vm_is_accepted_and_says_what_it_waits_for() {
    let node = Node::alone();
    node.add_content();
    node.tell();
    node.create(1, "a");
    node.until("the reason is seen", || {
        let vm = node.get(&format!("{VMS}/a")).json();
        vm["phase"] == "pending" && vm["reason"].as_str().is_some_and(|r| r.starts_with("agent unreachable"))
    });
    let refused = node.get(&format!("{VMS}/a:logs"));
    assert_eq!((refused.status, &refused.json()["error"]), (503, &json!("unavailable")));
    assert!(refused.json()["suggestion"].as_str().unwrap().contains("blixard-agent"));
    let health = node.get("/v1/health");
    assert_eq!((health.status, &health.json()["agent"]), (200, &json!(false)));

    let _agent = SimAgent::start(&node.agent_socket(), Manner::Prompt).unwrap();
    assert_eq!(node.get(&format!("{VMS}/a?wait=ready")).json()["phase"], "running");
}

#[test]
fn an_agent_that_was_restarted_is_given_the_plan_again() {
    let (node, agent) = Node::with_agent(Manner::Prompt);
    node.create(1, "a");
    node.get(&format!("{VMS}/a?wait=ready"));
    drop(agent);
    let agent = SimAgent::start_with(&node.agent_socket(), Manner::Prompt, 2, Default::default()).unwrap();
    assert!(agent.wait_for_plan(|plan| plan.vms.len() == 1).is_some());
}

#[test]
fn an_agent_gets_the_content_that_it_misses() {
    let (node, agent) = Node::with_agent(Manner::Prompt);
    agent.want_blobs();
    node.create(1, "a");
    assert!(agent.wait_for_blobs(3), "{:?}", agent.blobs());
    assert_eq!(node.get(&format!("{VMS}/a?wait=ready")).json()["phase"], "running");
}

#[test]
fn a_thousand_vms_each_get_their_own_address() {
    let (node, agent) = Node::with_agent(Manner::Prompt);
    std::thread::scope(|scope| {
        for part in 0..8u128 {
            let node = &node;
            scope.spawn(move || {
                (1..=125u128).for_each(|n| {
                    node.create(part * 1000 + n, &format!("vm{part}-{n}"));
                })
            });
        }
    });
    let plan = agent.wait_for_plan(|plan| plan.vms.len() == 1000).unwrap();
    let addresses: std::collections::BTreeSet<_> =
        plan.vms.iter().flat_map(|vm| vm.nic.as_ref().unwrap().spec.addresses.clone()).collect();
    assert_eq!(addresses.len(), 2000);
}
