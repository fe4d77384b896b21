//! VMs go where there is room, leave a node that is drained, and are started elsewhere when their node dies: three node
//! processes, each with an agent that has no host.
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

use std::time::{Duration, Instant};

use blixard_tests::sim_agent::{Manner, SimAgent};
use common::three::{leader_of, three};
use common::{Node, VMS, create, id};
use serde_json::{Value, json};

/// A cluster of three whose agents tell what they have.
struct Cluster {
    /// One per node; gone with a node that was killed. They end before the folders that their sockets are in.
    agents: Vec<Option<SimAgent>>,
    nodes: Vec<Node>,
}

impl Cluster {
    fn new() -> Self {
        let nodes = three();
        let agent = |node: &Node| Some(SimAgent::start(&node.agent_socket(), Manner::Prompt).unwrap());
        let cluster = Self { agents: nodes.iter().map(agent).collect(), nodes };
        for name in ["one", "two", "three"] {
            cluster.nodes[0].until("leases are enforced", || cluster.node(0, name)["leased"] == true);
        }
        cluster
    }

    /// What node number `asked` says of a node.
    fn node(&self, asked: usize, name: &str) -> Value {
        self.nodes[asked].get(&format!("/v1/nodes/{name}")).json()
    }

    /// What node number `asked` says of a VM.
    fn vm(&self, asked: usize, name: &str) -> Value {
        self.nodes[asked].get(&format!("{VMS}/{name}")).json()
    }

    /// Six VMs that may be started elsewhere, two on each node, and one on `there` that waits for its node.
    fn fill(&self, there: &str) {
        for number in 1..=6 {
            let mut body = create(number, &format!("v{number}"));
            body["spec"]["placement"] =
                json!({"anti_affinity": [{"group": "g", "scope": "node", "soft": true}]});
            let answer = self.nodes[0].post(VMS, &body);
            assert_eq!(answer.status, 201, "{}", answer.text());
        }
        let mut waits = create(9, "waits");
        waits["spec"]["placement"] = json!({
            "constraints": [{"key": "node", "op": "equal", "value": there}], "on_node_loss": "wait"
        });
        let answer = self.nodes[0].post(VMS, &waits);
        assert_eq!(answer.status, 201, "{}", answer.text());
        for name in ["v1", "v2", "v3", "v4", "v5", "v6", "waits"] {
            self.nodes[0].until("it runs", || self.vm(0, name)["phase"] == "running");
        }
        for name in ["one", "two", "three"] {
            assert!(
                self.node(0, name)["vms"].as_u64().unwrap() >= 2,
                "they are spread: {}",
                self.node(0, name)
            );
        }
    }

    /// Kills a node and its agent; answers how long it took until all VMs but the one that waits ran elsewhere.
    fn lose(&mut self, lost: usize) -> Duration {
        let (name, asked) = (self.nodes[lost].name().to_owned(), (lost + 1) % 3);
        // The agent's VMs die with their host.
        let begin = Instant::now();
        self.nodes[lost].kill();
        self.agents[lost] = None;
        let elsewhere = |number: u128| {
            let vm = self.vm(asked, &format!("v{number}"));
            vm["phase"] == "running" && vm["node"] != *name
        };
        self.nodes[asked].until("all of them run elsewhere", || (1..=6).all(elsewhere));
        begin.elapsed()
    }
}

fn check_moved(cluster: &mut Cluster, lost: usize) {
    let (name, asked) = (cluster.nodes[lost].name().to_owned(), (lost + 1) % 3);
    cluster.fill(&name);
    let before: Vec<Value> = (1..=6).map(|number| cluster.vm(asked, &format!("v{number}"))).collect();
    let took = cluster.lose(lost);
    eprintln!("{name} died: its VMs ran elsewhere after {} ms", took.as_millis());
    assert!(took < Duration::from_secs(10), "{took:?}");
    for vm in before {
        let now = cluster.vm(asked, vm["name"].as_str().unwrap());
        let moved = vm["node"] == *name;
        assert_eq!(now["epoch"].as_u64().unwrap(), if moved { 2 } else { 1 }, "{now}");
    }
    let waits = cluster.vm(asked, "waits");
    assert_eq!((&waits["node"], &waits["epoch"]), (&json!(name), &json!(1)), "it waits for its node");
    assert_eq!(cluster.node(asked, &name)["status"], "down");

    // It comes back with the plan that it had: what was placed elsewhere is taken off before it gets a lease.
    cluster.nodes[lost].start();
    let agent = SimAgent::start(&cluster.nodes[lost].agent_socket(), Manner::Prompt).unwrap();
    cluster.nodes[asked].until("it is back", || cluster.node(asked, &name)["status"] == "up");
    let kept = agent.wait_for_plan(|plan| plan.vms.len() == 1).unwrap();
    assert_eq!(kept.vms[0].vm.to_string(), id(9));
    cluster.nodes[asked].until("it has a lease again", || agent.lease().is_some());
}

#[test]
fn vms_of_a_node_that_dies_run_elsewhere_within_ten_seconds_but_for_those_that_wait_for_it() {
    let mut cluster = Cluster::new();
    let lost = (leader_of(&cluster.nodes) + 1) % 3;
    check_moved(&mut cluster, lost);
}

#[test]
fn vms_of_a_leader_that_dies_run_elsewhere_as_quickly() {
    let mut cluster = Cluster::new();
    let leader = leader_of(&cluster.nodes);
    check_moved(&mut cluster, leader);
}

#[test]
fn a_second_node_that_falls_silent_within_a_minute_is_declared_down_by_an_operator_only() {
    let mut cluster = Cluster::new();
    let leader = leader_of(&cluster.nodes);
    let (first, second) = ((leader + 1) % 3, (leader + 2) % 3);
    cluster.fill(cluster.nodes[first].name());
    cluster.lose(first);
    let (name, back) = (cluster.nodes[second].name().to_owned(), cluster.nodes[first].name().to_owned());
    // There is a majority again, but no third of the nodes is left that may be given up.
    cluster.nodes[first].start();
    cluster.nodes[leader].until("one is back", || cluster.node(leader, &back)["status"] == "up");
    cluster.nodes[second].kill();
    cluster.agents[second] = None;
    let refused = |node: &Node| !node.logged("a silent node is not declared down").is_empty();
    cluster.nodes[leader]
        .until("it is said", || refused(&cluster.nodes[leader]) || refused(&cluster.nodes[first]));
    assert_eq!(cluster.node(leader, &name)["status"], "suspected");
    let forced = cluster.nodes[leader].post(&format!("/v1/nodes/{name}:down"), &json!({}));
    assert_eq!(forced.json()["status"], "down", "{}", forced.text());
    cluster.nodes[leader].until("its VMs go elsewhere", || {
        (1..=6).all(|number| cluster.vm(leader, &format!("v{number}"))["node"] != *name)
    });
}

#[test]
fn a_drained_node_becomes_empty_but_for_what_waits_for_it_and_takes_vms_again_when_it_is_told_to() {
    let cluster = Cluster::new();
    cluster.fill("two");
    let drained = cluster.nodes[0].post("/v1/nodes/two:drain", &json!({"grace_ms": 100}));
    assert_eq!(drained.status, 200, "{}", drained.text());
    assert_eq!((&drained.json()["draining"], &drained.json()["cordoned"]), (&json!(true), &json!(true)));
    cluster.nodes[0].until("it is empty", || cluster.node(0, "two")["vms"] == 1);
    for number in 1..=6 {
        let name = format!("v{number}");
        cluster.nodes[0].until("it runs elsewhere", || {
            let vm = cluster.vm(0, &name);
            vm["phase"] == "running" && vm["node"] != "two"
        });
    }
    assert_eq!(cluster.vm(0, "waits")["node"], "two");
    let plan = cluster.agents[1].as_ref().unwrap().wait_for_plan(|plan| plan.vms.len() == 1).unwrap();
    assert_eq!(plan.vms[0].vm.to_string(), id(9));
    assert_eq!(cluster.nodes[0].post("/v1/nodes/two:uncordon", &json!({})).json()["draining"], false);
    let mut apart = create(10, "v10");
    apart["spec"]["placement"] = json!({"anti_affinity": [{"group": "g", "scope": "node", "soft": true}]});
    assert_eq!(cluster.nodes[0].post(VMS, &apart).json()["node"], "two", "the others are there no more");
}

#[test]
fn a_vm_runs_on_another_node_than_the_one_that_was_asked_which_fetches_what_it_needs() {
    let cluster = Cluster::new();
    cluster.agents.iter().flatten().for_each(SimAgent::want_blobs);
    for node in ["one", "three"] {
        assert_eq!(cluster.nodes[0].post(&format!("/v1/nodes/{node}:cordon"), &json!({})).status, 200);
    }
    // Image and kernel were given to node one.
    let answer = cluster.nodes[0].post(VMS, &create(1, "v1"));
    assert_eq!(answer.status, 201, "{}", answer.text());
    assert_eq!(answer.json()["node"], "two");
    cluster.nodes[0].until("it runs there", || cluster.vm(0, "v1")["phase"] == "running");
    assert!(cluster.agents[1].as_ref().unwrap().plan().vms.iter().any(|vm| vm.vm.to_string() == id(1)));
    assert!(cluster.agents[2].as_ref().unwrap().wait_for_blobs(3), "content is on every node");
}

#[test]
fn a_dry_run_says_where_a_vm_would_go_and_how_many_nodes_each_constraint_refuses() {
    let cluster = Cluster::new();
    assert_eq!(cluster.nodes[0].post("/v1/nodes/three:cordon", &json!({})).status, 200);
    let dry = |constraint: Value| {
        let mut body = create(1, "v1");
        body["spec"]["placement"] = json!({"constraints": [constraint]});
        cluster.nodes[0].post(&format!("{VMS}?dry_run=true"), &body)
    };
    let placed = dry(json!({"key": "zone", "op": "equal", "value": "two"}));
    assert_eq!(placed.status, 200, "{}", placed.text());
    let view = placed.json();
    assert_eq!((&view["node"], &view["nodes"], &view["possible"]), (&json!("two"), &json!(3), &json!(1)));
    let refused = view["refused"].as_array().unwrap();
    let count = |text: &str| {
        let by = refused.iter().find(|by| by["constraint"].as_str().unwrap().contains(text));
        by.unwrap_or_else(|| panic!("{text}: {view}"))["nodes"].clone()
    };
    assert_eq!((count("cordoned"), count("zone")), (json!(1), json!(1)));
    let nowhere = dry(json!({"key": "zone", "op": "equal", "value": "moon"})).json();
    assert_eq!((&nowhere["node"], &nowhere["possible"]), (&Value::Null, &json!(0)));
    assert_eq!(cluster.nodes[0].get(VMS).json()["items"], json!([]), "nothing was made");
    let mut impossible = create(1, "v1");
    impossible["spec"]["placement"] =
        json!({"constraints": [{"key": "zone", "op": "equal", "value": "moon"}]});
    let answer = cluster.nodes[0].post(VMS, &impossible);
    assert_eq!(answer.status, 507, "{}", answer.text());
    assert!(answer.text().contains("zone=moon (2)"), "{}", answer.text());
}
