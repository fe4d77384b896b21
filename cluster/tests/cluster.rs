//! Three nodes become one cluster, lose one of them, are lied to, and go on.
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
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::three::{founder, free_address, join_token, joined, leader_of, three, voters};
use common::{Answer, Node, VMS, create, id};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// Waits until a node has started its parts anew with an identity.
fn served(node: &Node) {
    node.until("it serves others", || !node.logged("other nodes and users are served").is_empty());
}

#[test]
fn three_nodes_form_a_cluster_and_each_takes_writes_that_the_others_see() {
    let nodes = three();
    let mut newest = 0;
    for (n, node) in nodes.iter().enumerate() {
        let number = n as u128 + 1;
        let answer = node.post(VMS, &create(number, &format!("vm-{number}")));
        assert_eq!(answer.status, 201, "{}", answer.text());
        newest = answer.revision();
        // Whoever was asked has it at once; the others when they are asked for that revision, or for the newest one.
        assert_eq!(node.get(&format!("{VMS}/vm-{number}")).status, 200);
        for other in &nodes {
            assert_eq!(other.get(&format!("{VMS}/vm-{number}?min_revision={newest}")).status, 200);
            assert_eq!(other.get(&format!("{VMS}/vm-{number}?linearizable=true")).status, 200);
        }
    }
    let list = nodes[2].get(&format!("{VMS}?min_revision={newest}")).json();
    assert_eq!(list["items"].as_array().unwrap().len(), 3);
    let roles: Vec<Value> = nodes[1].get("/v1/nodes").json()["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|n| n["role"].clone())
        .collect();
    assert_eq!(roles.iter().filter(|role| **role == "leader").count(), 1, "{roles:?}");
    assert_eq!(roles.iter().filter(|role| **role == "voter").count(), 2, "{roles:?}");
}

/// Writes until told to stop; answers which VMs were acknowledged. Each client goes to the next node when one fails.
fn write_until(
    sockets: &[PathBuf],
    part: u128,
    stop: &AtomicBool,
    acknowledged: &Mutex<Vec<(u128, Instant)>>,
) {
    let mut number = part * 1_000_000;
    let mut at = part as usize;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let body = create(number, &format!("vm-{number}")).to_string();
        while !stop.load(Ordering::Relaxed) {
            if written(&sockets[at % sockets.len()], &body) {
                acknowledged.lock().unwrap().push((number, Instant::now()));
                break;
            }
            at += 1;
        }
    }
}

/// True when the node answered that the VM is there.
fn written(socket: &Path, body: &str) -> bool {
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

/// Tells the writers to end when it goes.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs `disturb` while four clients write, until some more writes came through; answers what was acknowledged.
fn under_load(nodes: &mut [Node], disturb: impl FnOnce(&mut [Node])) -> Vec<u128> {
    let sockets: Vec<PathBuf> = nodes.iter().map(Node::socket).collect();
    let (stop, acknowledged) = (AtomicBool::new(false), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        // Also when this thread fails: the others would write for ever, and be waited for.
        let _stop = StopAtEnd(&stop);
        for part in 1..=4 {
            let (sockets, stop, acknowledged) = (&sockets, &stop, &acknowledged);
            scope.spawn(move || write_until(sockets, part, stop, acknowledged));
        }
        let begin = Instant::now();
        let count = || acknowledged.lock().unwrap().len();
        while count() < 40 {
            assert!(begin.elapsed() < Duration::from_secs(30), "no writes");
            std::thread::yield_now();
        }
        disturb(nodes);
        let moment = Instant::now();
        let after = || acknowledged.lock().unwrap().iter().filter(|(_, at)| *at > moment).count();
        while after() < 20 {
            assert!(moment.elapsed() < Duration::from_secs(30), "no writes after the disturbance");
            std::thread::yield_now();
        }
    });
    acknowledged.into_inner().unwrap().into_iter().map(|(number, _)| number).collect()
}

fn all_know(nodes: &[Node], numbers: &[u128]) {
    for node in nodes {
        // One linearizable read makes the rest of this node's answers new enough.
        assert_eq!(node.get("/v1/cluster?linearizable=true").status, 200);
        for number in numbers {
            let answer = node.get(&format!("{VMS}/{}", id(*number)));
            assert_eq!(answer.status, 200, "vm-{number} on {}", node.name());
        }
    }
}

#[test]
fn nothing_acknowledged_is_lost_when_the_leader_is_killed_and_it_comes_back_with_all_of_it() {
    let mut nodes = three();
    let leader = leader_of(&nodes);
    let numbers = under_load(&mut nodes, |nodes| nodes[leader].kill());
    nodes[leader].start();
    all_know(&nodes, &numbers);
}

#[test]
fn a_leader_that_was_frozen_finds_another_one_and_takes_over_what_it_missed() {
    let mut nodes = three();
    let leader = leader_of(&nodes);
    let numbers = under_load(&mut nodes, |nodes| nodes[leader].signal(Signal::SIGSTOP));
    nodes[leader].signal(Signal::SIGCONT);
    let others = (leader + 1) % 3;
    nodes[leader].until("it follows", || {
        let status = |node: &Node| node.get("/v1/cluster").json();
        let (old, new) = (status(&nodes[leader]), status(&nodes[others]));
        old["leader"] == new["leader"] && old["applied"].as_u64() >= new["applied"].as_u64()
    });
    all_know(&nodes, &numbers);
}

#[test]
fn a_write_that_the_next_leader_discards_is_asked_for_again_and_answered_once() {
    let nodes = three();
    let leader = leader_of(&nodes);
    let followers = [(leader + 1) % 3, (leader + 2) % 3];
    let last_log = || -> u64 {
        let metrics = nodes[leader].get("/metrics").text();
        let line = metrics.lines().find(|l| l.starts_with(r#"blixard_raft{what="last_log"}"#)).unwrap();
        line.rsplit_once(' ').unwrap().1.parse().unwrap()
    };
    let before = last_log();
    followers.iter().for_each(|f| nodes[*f].signal(Signal::SIGSTOP));
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| nodes[leader].post(VMS, &create(1, "once")));
        nodes[leader].until("it is in the log of the leader alone", || last_log() > before);
        nodes[leader].signal(Signal::SIGSTOP);
        followers.iter().for_each(|f| nodes[*f].signal(Signal::SIGCONT));
        let next = &nodes[followers[0]];
        next.until("another one leads", || {
            let leader_now = next.get("/v1/cluster").json()["leader"].clone();
            followers.iter().any(|f| leader_now == nodes[*f].name())
        });
        nodes[leader].signal(Signal::SIGCONT);
        let answer = asked.join().unwrap();
        assert_eq!(answer.status, 201, "{}", answer.text());
    });
    all_know(&nodes, &[1]);
}

#[test]
fn a_node_that_lost_its_disk_state_while_the_log_was_cut_gets_a_snapshot() {
    let nodes = three();
    // The log is cut every 50 entries.
    for number in 1..=200 {
        assert_eq!(nodes[0].post(VMS, &create(number, &format!("vm-{number}"))).status, 201);
    }
    let four = joined("four", &join_token(&nodes[1]));
    let list = "/v1/projects/default/vms?linearizable=true";
    four.until("it has everything", || {
        four.get(list).json()["items"].as_array().is_some_and(|items| items.len() == 200)
    });
    assert_eq!(voters(&four).len(), 3, "a fourth voter would gain nothing");
    // It goes, and with it its right to connect.
    assert_eq!(nodes[2].delete("/v1/nodes/four").status, 200);
    four.until("nobody confirms to it what it has", || four.get(list).status == 503);
    assert_eq!(nodes[0].get("/v1/nodes?linearizable=true").json()["items"].as_array().unwrap().len(), 3);
}

#[test]
fn leadership_moves_on_request_and_when_the_leader_ends_in_good_order() {
    let mut nodes = three();
    let leader = leader_of(&nodes);
    let other = (leader + 1) % 3;
    let wanted = nodes[other].name().to_owned();
    // Any node can be asked: the leader, the one that shall lead, a third one.
    for asked in [leader, other, (leader + 2) % 3] {
        let answer = nodes[asked].post("/v1/cluster:transfer-leader", &json!({"to": wanted}));
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(answer.json()["leader"], *wanted);
    }
    let back = nodes[leader].name().to_owned();
    let answer = nodes[(leader + 2) % 3].post("/v1/cluster:transfer-leader", &json!({"to": back}));
    assert_eq!((answer.status, &answer.json()["leader"]), (200, &json!(back)), "{}", answer.text());
    let answer = nodes[other].post("/v1/cluster:transfer-leader", &json!({"to": wanted}));
    assert_eq!((answer.status, &answer.json()["leader"]), (200, &json!(wanted)), "{}", answer.text());
    assert!(nodes[other].terminate());
    let rest = if leader == 0 { 0 } else { leader };
    assert_eq!(nodes[rest].post(VMS, &create(1, "a")).status, 201);
    let name = nodes[rest].get("/v1/cluster").json()["leader"].clone();
    assert_ne!(name, *wanted);
    // A voter that is dead is not asked to lead: nothing would be written until another one is elected.
    let leader = nodes.iter().find(|node| name == node.name()).unwrap();
    leader.until("it is silent", || {
        let view = leader.get(&format!("/v1/nodes/{wanted}")).json();
        view["heard_ms_ago"].as_u64().is_none_or(|ms| ms > 2_500)
    });
    let term = leader.get("/v1/cluster").json()["term"].clone();
    let answer = leader.post("/v1/cluster:transfer-leader", &json!({"to": wanted}));
    assert_eq!(answer.status, 409, "{}", answer.text());
    assert!(answer.text().contains("does not answer"), "{}", answer.text());
    assert_eq!(leader.get("/v1/cluster").json()["term"], term, "there was no election");
    leader.until("it is not up", || leader.get(&format!("/v1/nodes/{wanted}")).json()["status"] != "up");
    let answer = leader.post("/v1/cluster:transfer-leader", &json!({}));
    assert_eq!(answer.status, 200, "the one that is left: {}", answer.text());
    assert_ne!(answer.json()["leader"], name);
}

#[test]
fn a_token_is_for_one_node_and_one_hour_and_a_wrong_one_for_none() {
    let one = founder("one");
    let token = join_token(&one);
    let two = joined("two", &token);
    two.until("it has joined", || two.get("/v1/nodes/one").status == 200);
    let refused = |token: &str, reason: &str| {
        let folder = tempfile::tempdir().unwrap();
        let address = free_address().to_string();
        let output = Command::new(env!("CARGO_BIN_EXE_blixard-node"))
            .arg("--state")
            .arg(folder.path())
            .arg("--socket")
            .arg(folder.path().join("s"))
            .args(["--name", "thief", "--address", &address, "--join", token])
            .output()
            .unwrap();
        assert!(!output.status.success());
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains(reason), "{reason}: {text}");
    };
    refused(&token, "there is no such token");
    assert!(!one.logged("a node may not join").is_empty());
    let mut parts: Vec<String> = join_token(&one).split('.').map(str::to_owned).collect();
    parts[2] = "00".repeat(32);
    refused(&parts.join("."), "invalid peer certificate");
    let short = one.post("/v1/join-tokens", &json!({"ttl_ms": 1000})).json();
    let ends = short["expires_at_ms"].as_u64().unwrap();
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis();
    one.until("the token is over", || now() > u128::from(ends));
    refused(short["token"].as_str().unwrap(), "expired");
}

#[test]
fn strangers_on_the_port_are_refused_and_the_reason_is_logged() {
    let one = founder("one");
    let address: SocketAddr = one.get("/v1/nodes/one").json()["address"].as_str().unwrap().parse().unwrap();
    let mut garbage = TcpStream::connect(address).unwrap();
    garbage.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    // The node closes the connection, with or without a last word.
    let mut rest = Vec::new();
    garbage.read_to_end(&mut rest).ok();
    one.until("garbage is logged", || !one.logged("a connection is refused").is_empty());

    let openssl = |arguments: &[&str]| {
        let mut command = Command::new("openssl");
        command.args(["s_client", "-connect", &address.to_string()]).args(arguments);
        command.stdin(std::process::Stdio::null()).output().ok()
    };
    let Some(output) = openssl(&["-alpn", "blixard-peer/2"]) else {
        eprintln!("skipped: no openssl program");
        return;
    };
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("alert") || !output.status.success(), "{text}");
    one.until("a newer peer is logged", || one.logged("a connection is refused").len() >= 2);
    openssl(&["-alpn", "blixard-peer/1"]);
    one.until("a peer without a certificate is logged", || !one.logged("shows no certificate").is_empty());
}

#[test]
fn users_need_a_token_and_find_the_cluster_by_it() {
    let nodes = three();
    let address = nodes[1].get("/v1/nodes/two").json()["address"].as_str().unwrap().to_owned();
    let made = nodes[0].post("/v1/tokens", &json!({"name": "ci"}));
    assert_eq!(made.status, 201, "{}", made.text());
    let revision = made.revision();
    assert_eq!(nodes[1].get(&format!("/v1/nodes?min_revision={revision}")).status, 200);
    let token: blixard_api::token::ApiToken = made.json()["token"].as_str().unwrap().parse().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let host: blixard_api::client::Host = format!("https://{address}").parse().unwrap();
    let ask = |access: blixard_api::token::Access| {
        runtime.block_on(blixard_api::Client::new(host.clone().with_access(access)).list_nodes())
    };
    assert_eq!(ask(token.0.clone()).unwrap().items.len(), 3);
    let stranger = blixard_api::token::Access { secret: "00".repeat(32), ..token.0.clone() };
    assert_eq!(ask(stranger).unwrap_err().status(), Some(401));
    let impostor = blixard_api::token::Access { authority_sha256: "00".repeat(32), ..token.0.clone() };
    assert!(matches!(ask(impostor), Err(blixard_api::ClientError::Connect { .. })));
    assert_eq!(nodes[2].delete("/v1/tokens/ci").status, 200);
    assert_eq!(nodes[1].get("/v1/nodes?linearizable=true").status, 200);
    assert_eq!(ask(token.0).unwrap_err().status(), Some(401));
}

#[test]
fn the_authority_changes_while_the_cluster_works_and_old_certificates_go_with_it() {
    let nodes = three();
    let read = |node: &Node, file: &str| {
        std::fs::read_to_string(node.folder.path().join("state/identity").join(file))
    };
    let before: Vec<String> = nodes.iter().map(|node| read(node, "authorities.crt").unwrap()).collect();
    let begun = nodes[1].ask("POST", "/v1/cluster:rotate-authority", &[], b"");
    assert_eq!(begun.status, 200, "{}", begun.text());
    let again = nodes[1].ask("POST", "/v1/cluster:rotate-authority", &[], b"");
    assert_eq!(again.status, 409, "{}", again.text());
    nodes[0].until("all follow", || {
        nodes[0].get("/v1/cluster").json()["rotating"] == false
            && nodes.iter().zip(&before).all(|(node, before)| {
                let now = read(node, "authorities.crt").unwrap();
                now != *before && now.matches("BEGIN").count() == 1
            })
    });
    // New connections are made with the new certificates: a node that starts again gets in.
    let mut nodes = nodes;
    nodes[2].kill();
    nodes[2].start();
    assert_eq!(nodes[2].post(VMS, &create(1, "a")).status, 201);
    assert_eq!(nodes[2].get("/v1/cluster?linearizable=true").status, 200);
}

#[test]
fn an_empty_node_leaves_its_own_cluster_for_another_one_at_run_time() {
    let one = Node::named("one", &[], &[]);
    let address = free_address().to_string();
    let begun = one.post("/v1/cluster:init", &json!({"address": address}));
    assert_eq!(begun.status, 200, "{}", begun.text());
    served(&one);
    one.until("it says where it is", || one.get("/v1/nodes/one").json()["address"] == *address);
    one.add_content();
    one.tell();
    assert_eq!(one.post(VMS, &create(1, "a")).status, 201);
    let two = Node::named("two", &[], &[]);
    let address = free_address().to_string();
    let wanted = json!({"token": join_token(&one), "address": address});
    let answer: Answer = two.post("/v1/node:join", &wanted);
    assert_eq!(answer.status, 200, "{}", answer.text());
    served(&two);
    two.until("it knows the other cluster", || two.get(&format!("{VMS}/a")).status == 200);
    let busy = one.post("/v1/node:join", &json!({"token": join_token(&one), "address": "127.0.0.1:1"}));
    assert_eq!(busy.status, 409, "{}", busy.text());
}

#[test]
fn one_survivor_of_three_goes_on_by_an_explicit_command() {
    let mut nodes = three();
    // Elsewhere it would keep its node from being forgotten.
    let on_three = |number, name| {
        let mut body = create(number, name);
        body["spec"]["placement"] =
            json!({"constraints": [{"key": "node", "op": "equal", "value": "three"}]});
        body
    };
    assert_eq!(nodes[2].post(VMS, &on_three(1, "a")).status, 201);
    let mut survivor = nodes.pop().unwrap();
    for node in &mut nodes {
        node.kill();
    }
    let lost = survivor.post(VMS, &on_three(2, "b"));
    assert_eq!(lost.status, 503, "{}", lost.text());
    assert!(survivor.terminate());
    let output = Command::new(env!("CARGO_BIN_EXE_blixard-node"))
        .arg("--state")
        .arg(survivor.folder.path().join("state"))
        .arg("--force-new-cluster")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    survivor.start();
    assert_eq!(survivor.get(&format!("{VMS}/a")).status, 200);
    assert_eq!(survivor.post(VMS, &on_three(2, "b")).status, 201);
    survivor.until("the others are forgotten", || {
        survivor.get("/v1/nodes").json()["items"].as_array().unwrap().len() == 1
    });
}
