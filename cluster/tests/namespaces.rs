//! Three nodes with agents in network namespaces of their own: they form a cluster, one is cut off, the leader is cut off under
//! load, and all come together again. Needs root and `ip`; elsewhere it says that it is skipped.
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

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blixard_tests::sim_agent::{Manner, SimAgent};
use common::{Node, VMS, create, id};
use serde_json::json;

const PORT: u16 = 7440;

/// A bridge in a namespace, and three namespaces that hang on it.
struct Hosts {
    prefix: String,
}

fn ip(arguments: &str) -> bool {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    match output {
        Ok(output) if output.status.success() => true,
        Ok(output) => {
            eprintln!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim());
            false
        }
        Err(_) => false,
    }
}

impl Hosts {
    /// `None` where namespaces cannot be made.
    fn new() -> Option<Self> {
        let hosts = Self { prefix: format!("blx{}", std::process::id()) };
        let hub = hosts.name(0);
        let mut good = ip(&format!("netns add {hub}"))
            && ip(&format!("-n {hub} link add br0 type bridge"))
            && ip(&format!("-n {hub} link set br0 up"));
        for host in 1..=3 {
            let name = hosts.name(host);
            good = good
                && ip(&format!("netns add {name}"))
                && ip(&format!("-n {hub} link add v{host} type veth peer name eth0 netns {name}"))
                && ip(&format!("-n {hub} link set v{host} master br0 up"))
                && ip(&format!("-n {name} addr add 10.77.0.{host}/24 dev eth0"))
                && ip(&format!("-n {name} link set eth0 up"))
                && ip(&format!("-n {name} link set lo up"));
        }
        good.then_some(hosts)
    }

    fn name(&self, host: usize) -> String {
        format!("{}n{host}", self.prefix)
    }

    fn link(&self, host: usize, state: &str) {
        assert!(ip(&format!("-n {} link set v{host} {state}", self.name(0))));
    }

    fn node(&self, host: usize, token: Option<&str>) -> Node {
        let (name, address) = (self.name(host), format!("10.77.0.{host}:{PORT}"));
        let node = format!("n{host}");
        let mut arguments = vec!["--address", &address];
        arguments.extend(token.into_iter().flat_map(|token| ["--join", token]));
        Node::named(&node, &["ip", "netns", "exec", &name], &arguments)
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for host in 0..=3 {
            ip(&format!("netns del {}", self.name(host)));
        }
    }
}

fn written(socket: &std::path::Path, number: u128) -> bool {
    let body = create(number, &format!("vm-{number}")).to_string();
    let Ok(mut stream) = UnixStream::connect(socket) else { return false };
    stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let length = body.len();
    let head =
        format!("POST {VMS} HTTP/1.1\r\nHost: n\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
    let mut answer = String::new();
    stream.write_all(head.as_bytes()).is_ok()
        && stream.write_all(body.as_bytes()).is_ok()
        && stream.read_to_string(&mut answer).is_ok()
        && (answer.starts_with("HTTP/1.1 201") || answer.starts_with("HTTP/1.1 200"))
}

fn leader(node: &Node) -> String {
    node.get("/v1/cluster").json()["leader"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn a_cluster_works_on_while_one_node_is_cut_off_and_comes_together_when_it_is_back() {
    let Some(hosts) = Hosts::new() else {
        eprintln!("skipped: network namespaces need root and ip");
        return;
    };
    let first = hosts.node(1, None);
    first.until("it says where it is", || !first.get("/v1/nodes/n1").json()["address"].is_null());
    first.add_content();
    let token = || first.post("/v1/join-tokens", &json!({})).json()["token"].as_str().unwrap().to_owned();
    let (second, third) = (hosts.node(2, Some(&token())), hosts.node(3, Some(&token())));
    let nodes = [first, second, third];
    let agents: Vec<SimAgent> =
        nodes.iter().map(|node| SimAgent::start(&node.agent_socket(), Manner::Prompt).unwrap()).collect();
    for node in &nodes {
        node.until("all vote", || node.get("/v1/cluster").json()["voters"].as_array().unwrap().len() == 3);
    }

    // The leader is cut off while writers go from node to node.
    let before = leader(&nodes[0]);
    let cut = nodes.iter().position(|node| node.name() == before).unwrap();
    let (stop, acknowledged) = (AtomicBool::new(false), Mutex::new(Vec::new()));
    let healed = std::thread::scope(|scope| {
        for part in 1..=3_u128 {
            let (nodes, stop, acknowledged) = (&nodes, &stop, &acknowledged);
            scope.spawn(move || {
                let (mut number, mut at) = (part * 1_000_000, part as usize);
                while !stop.load(Ordering::Relaxed) {
                    number += 1;
                    while !stop.load(Ordering::Relaxed) && !written(&nodes[at % 3].socket(), number) {
                        at += 1;
                    }
                    if !stop.load(Ordering::Relaxed) {
                        acknowledged.lock().unwrap().push((number, Instant::now()));
                    }
                }
            });
        }
        let count = |since: Option<Instant>| {
            acknowledged
                .lock()
                .unwrap()
                .iter()
                .filter(|(_, at)| since.is_none_or(|since| *at > since))
                .count()
        };
        nodes[0].until("writes go through", || count(None) > 20);
        hosts.link(cut + 1, "down");
        let moment = Instant::now();
        nodes[0].until("writes go through without the leader", || count(Some(moment)) > 20);
        let alone = nodes[cut].get("/v1/cluster?linearizable=true");
        assert_eq!(alone.status, 503, "a node that is cut off confirms nothing: {}", alone.text());
        hosts.link(cut + 1, "up");
        stop.store(true, Ordering::Relaxed);
        Instant::now()
    });
    let other = (cut + 1) % 3;
    assert_ne!(leader(&nodes[other]), before);
    nodes[cut].until("it follows again", || {
        let (old, new) = (nodes[cut].get("/v1/cluster").json(), nodes[other].get("/v1/cluster").json());
        old["leader"] == new["leader"] && old["applied"].as_u64() >= new["applied"].as_u64()
    });
    eprintln!("converged {} ms after the partition healed", healed.elapsed().as_millis());
    for node in &nodes {
        assert_eq!(node.get("/v1/cluster?linearizable=true").status, 200);
        for (number, _) in acknowledged.lock().unwrap().iter() {
            assert_eq!(node.get(&format!("{VMS}/{}", id(*number))).status, 200, "vm-{number}");
        }
    }
    // Each agent was asked for the VMs of its node.
    for (node, agent) in nodes.iter().zip(&agents) {
        let placed = node.get(&format!("/v1/nodes/{}", node.name())).json()["vms"].as_u64().unwrap();
        assert!(agent.wait_for_plan(|plan| plan.vms.len() as u64 == placed).is_some());
    }
}
