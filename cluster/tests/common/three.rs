//! Three nodes that are one cluster.

use std::net::{SocketAddr, TcpListener};

use serde_json::{Value, json};

use super::Node;

/// An address that nobody listens at.
pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

pub fn join_token(node: &Node) -> String {
    let answer = node.post("/v1/join-tokens", &json!({}));
    assert_eq!(answer.status, 201, "{}", answer.text());
    answer.json()["token"].as_str().unwrap().to_owned()
}

/// A node that founds a cluster which others can join.
pub fn founder(zone: &str) -> Node {
    let address = free_address().to_string();
    let label = format!("zone={zone}");
    let node = Node::named("one", &[], &["--address", &address, "--label", &label]);
    node.until("it says where it is", || node.get("/v1/nodes/one").json()["address"] == *address);
    node
}

pub fn joined(name: &str, token: &str) -> Node {
    let (address, label) = (free_address().to_string(), format!("zone={name}"));
    Node::named(name, &[], &["--address", &address, "--label", &label, "--join", token])
}

pub fn voters(node: &Node) -> Vec<Value> {
    node.get("/v1/cluster").json()["voters"].as_array().unwrap().clone()
}

/// Three voters, with an image and a kernel.
pub fn three() -> Vec<Node> {
    let one = founder("one");
    one.add_content();
    let two = joined("two", &join_token(&one));
    let three = joined("three", &join_token(&one));
    let nodes = vec![one, two, three];
    for node in &nodes {
        node.until("all three vote", || voters(node).len() == 3);
        node.tell();
    }
    nodes
}

pub fn leader_of(nodes: &[Node]) -> usize {
    let leader = || {
        let leader = nodes[0].get("/v1/cluster").json()["leader"].clone();
        nodes.iter().position(|node| leader == node.name())
    };
    nodes[0].until("somebody leads", || leader().is_some());
    leader().unwrap()
}
