//! What survives: kills, restarts, the end in good order, and only one node per folder.
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

use std::process::{Command, Stdio};
use std::sync::Mutex;

use blixard_tests::sim_agent::Manner;
use common::{Node, VMS, create, id};

#[test]
fn nothing_acknowledged_is_lost_when_the_node_is_killed_while_many_write() {
    let (mut node, agent) = Node::with_agent(Manner::Prompt);
    let mut begin = 0;
    for round in 0..3u32 {
        let acknowledged = Mutex::new(Vec::new());
        let pid = node.pid();
        std::thread::scope(|scope| {
            for part in 0..4u128 {
                let (socket, acknowledged) = (node.socket(), &acknowledged);
                scope.spawn(move || {
                    for n in 0..10_000u128 {
                        let number = begin + part * 100_000 + n + 1;
                        let body = create(number, &format!("vm-{number}")).to_string();
                        if !written(&socket, &body) {
                            return;
                        }
                        acknowledged.lock().unwrap().push(number);
                    }
                });
            }
            // Killed once some hundred writes are through, wherever the rest of them is then.
            while acknowledged.lock().unwrap().len() < 150 * usize::try_from(round + 1).unwrap() {
                std::thread::yield_now();
            }
            let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        });
        node.kill();
        node.start();
        for number in acknowledged.into_inner().unwrap() {
            assert_eq!(
                node.get(&format!("{VMS}/{}", id(number))).status,
                200,
                "vm-{number} of round {round}"
            );
        }
        begin += 1_000_000;
    }
    let count = node.get("/metrics").text();
    assert!(count.contains("blixard_raft{what=\"purged\"}"), "{count}");
    // The agent is asked for the same VMs as before.
    let known = agent.plan().vms.len();
    assert!(agent.wait_for_plan(|plan| plan.vms.len() >= known && known > 300).is_some());
}

/// True when the node answered that it made the VM.
fn written(socket: &std::path::Path, body: &str) -> bool {
    use std::io::{Read, Write};
    let Ok(mut stream) = std::os::unix::net::UnixStream::connect(socket) else { return false };
    let head = format!(
        "POST {VMS} HTTP/1.1\r\nHost: n\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut answer = String::new();
    stream.write_all(head.as_bytes()).is_ok()
        && stream.read_to_string(&mut answer).is_ok()
        && answer.starts_with("HTTP/1.1 201")
}

#[test]
fn a_node_ends_in_good_order_and_goes_on_where_it_was() {
    let (mut node, _agent) = Node::with_agent(Manner::Prompt);
    node.create(1, "a");
    let before = node.get(&format!("{VMS}/a?wait=ready")).json();
    assert!(node.terminate());
    assert!(!node.socket().exists());
    node.start();
    let after = node.get(&format!("{VMS}/a")).json();
    for field in ["id", "generation", "start", "phase", "addresses", "started_at_ms"] {
        assert_eq!(after[field], before[field], "{field}");
    }
    node.create(2, "b");
}

#[test]
fn a_second_node_on_the_same_socket_does_not_start() {
    let node = Node::alone();
    let second = Command::new(env!("CARGO_BIN_EXE_blixard-node"))
        .arg("--state")
        .arg(node.folder.path().join("other"))
        .arg("--socket")
        .arg(node.socket())
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("another process listens"));
    assert_eq!(node.get("/v1/version").status, 200);
}

#[test]
fn a_second_node_on_the_same_folder_does_not_start_and_harms_nothing() {
    let node = Node::alone();
    node.add_content();
    let second = Command::new(env!("CARGO_BIN_EXE_blixard-node"))
        .arg("--state")
        .arg(node.folder.path().join("state"))
        .arg("--socket")
        .arg(node.folder.path().join("second.sock"))
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert!(!second.status.success(), "{}", String::from_utf8_lossy(&second.stderr));
    assert_eq!(node.get("/v1/images/img").status, 200);
}

#[test]
fn an_address_that_others_could_reach_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_blixard-node"))
        .arg("--state")
        .arg(folder.path())
        .arg("--socket")
        .arg(folder.path().join("s"))
        .args(["--listen", "0.0.0.0:0"])
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("not a loopback address"));
}
