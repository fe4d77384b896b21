//! What goes on longer than a request: watches, exec, console, logs.
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

use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use blixard_agent_api::{Phase, Start};
use blixard_tests::sim_agent::{Manner, SimAgent};
use common::three::three;
use common::{Node, VMS, create, read_chunk, read_head};
use serde_json::{Value, json};

/// Lines of a watch.
struct Watch(BufReader<UnixStream>, Vec<u8>);

impl Watch {
    fn after(node: &Node, revision: u64) -> Self {
        let mut reader = BufReader::new(node.open("GET", &format!("/v1/watch?after={revision}"), &[], 0));
        assert_eq!(read_head(&mut reader).0, 200);
        Self(reader, vec![])
    }

    fn next(&mut self) -> Value {
        loop {
            if let Some(end) = self.1.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.1.drain(..=end).collect();
                return serde_json::from_slice(&line).unwrap();
            }
            self.1.extend(read_chunk(&mut self.0).unwrap());
        }
    }
}

#[test]
fn a_watch_tells_every_change_once_and_goes_on_after_an_interruption() {
    let (node, _agent) = Node::with_agent(Manner::Prompt);
    let begin = node.get(VMS).revision();
    let mut watch = Watch::after(&node, begin);
    node.create(1, "a");
    let first = watch.next();
    assert_eq!(first["change"]["vm"]["name"], "a");
    assert_eq!(first["change"]["vm"]["phase"], "pending");
    drop(watch);

    node.get(&format!("{VMS}/a?wait=ready"));
    node.delete(&format!("{VMS}/a?force=true"));
    assert_eq!(node.get(&format!("{VMS}/a?wait=gone")).status, 404);

    let mut watch = Watch::after(&node, first["revision"].as_u64().unwrap());
    let mut seen = vec![];
    let mut last = first["revision"].as_u64().unwrap();
    loop {
        let event = watch.next();
        let revision = event["revision"].as_u64().unwrap();
        assert!(revision > last, "in order, none twice");
        last = revision;
        if let Some(gone) = event["change"].get("vm_gone") {
            assert_eq!(gone["name"], "a");
            break;
        }
        let vm = &event["change"]["vm"];
        seen.push(format!("{} {}", vm["desired"].as_str().unwrap(), vm["phase"].as_str().unwrap()));
    }
    assert_eq!(seen, ["running running", "gone running"]);
}

#[test]
fn a_watch_of_what_a_restarted_node_no_longer_remembers_is_told_to_begin_anew() {
    let (mut node, _agent) = Node::with_agent(Manner::Manual);
    // What the log still has is applied anew and remembered; so it has to be cut.
    for number in 1..=60 {
        node.create(number, &format!("vm{number}"));
    }
    let uncut = "blixard_raft{what=\"snapshot\"} 0\n";
    node.until("there is a snapshot", || !node.get("/metrics").text().contains(uncut));
    assert!(node.terminate());
    node.start();
    let answer = node.get("/v1/watch?after=1");
    assert_eq!((answer.status, answer.json()["error"].as_str()), (410, Some("compacted")));
    assert!(answer.json()["suggestion"].as_str().unwrap().contains("list"));
}

fn upgraded(node: &Node, verb: &str) -> UnixStream {
    let headers = [("Connection", "upgrade"), ("Upgrade", "blixard-stream")];
    let mut stream = node.open("POST", &format!("{VMS}/a:{verb}"), &headers, 0);
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.extend(byte);
    }
    assert!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
    stream
}

/// Exec and console of the VM `a`, asked of this node, carry much both ways, and the answer also when the question has ended.
fn carries(node: &Node) {
    for verb in ["exec", "console"] {
        let mut stream = upgraded(node, verb);
        let sent: Vec<u8> = (0..1_000_000u32).flat_map(u32::to_le_bytes).collect();
        let mut writer = stream.try_clone().unwrap();
        let copy = sent.clone();
        let write = std::thread::spawn(move || {
            writer.write_all(&copy).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut seen = Vec::new();
        stream.read_to_end(&mut seen).unwrap();
        write.join().unwrap();
        assert_eq!(seen.len(), sent.len() + 3);
        assert!(seen.starts_with(&sent) && seen.ends_with(b"end"), "{verb}");
    }
}

#[test]
fn a_stream_carries_both_ways_and_one_side_may_have_said_all() {
    let (node, _agent) = Node::with_agent(Manner::Prompt);
    node.create(1, "a");
    node.get(&format!("{VMS}/a?wait=ready"));
    carries(&node);
}

#[test]
fn any_node_passes_on_to_the_node_of_a_vm_and_says_when_it_cannot() {
    let mut nodes = three();
    let agent = SimAgent::start(&nodes[2].agent_socket(), Manner::Prompt).unwrap();
    let mut body = create(1, "a");
    body["spec"]["placement"] = json!({"constraints": [{"key": "node", "op": "equal", "value": "three"}]});
    // At once, on a node that may not have heard of it yet.
    assert_eq!(nodes[1].post(VMS, &body).status, 201);
    nodes[0].until("it runs", || nodes[0].get(&format!("{VMS}/a")).json()["phase"] == "running");
    carries(&nodes[0]);
    carries(&nodes[2]);

    let path = nodes[2].folder.path().join("console.log");
    std::fs::write(&path, "one\ntwo\n").unwrap();
    agent.set_log(agent.plan().vms[0].vm, File::open(&path).unwrap());
    let logs = |node: &Node, query: &str| node.get(&format!("{VMS}/a:logs{query}"));
    assert_eq!(logs(&nodes[0], "").text(), "one\ntwo\n");
    assert_eq!(logs(&nodes[0], "?tail=1").text(), "two\n");
    let refused = logs(&nodes[0], "?tail=x");
    assert_eq!((refused.status, refused.json()["error"].as_str()), (422, Some("validation_error")));
    assert_eq!(refused.json()["request_id"].as_str(), refused.header("blixard-request-id").as_deref());
    let mut follow =
        BufReader::new(nodes[0].open("GET", &format!("{VMS}/a:logs?follow=true&tail=1"), &[], 0));
    assert_eq!(read_head(&mut follow).0, 200);
    assert_eq!(read_chunk(&mut follow).unwrap(), b"two\n");
    File::options().append(true).open(&path).unwrap().write_all(b"three\n").unwrap();
    assert_eq!(read_chunk(&mut follow).unwrap(), b"three\n");

    // A node that is removed is cut off from what it has passed on.
    let mut through_two = upgraded(&nodes[1], "console");
    assert_eq!(nodes[0].ask("DELETE", "/v1/nodes/two", &[], b"").status, 200);
    let mut rest = Vec::new();
    through_two.read_to_end(&mut rest).unwrap();
    assert_eq!(nodes[1].get("/v1/version").status, 200, "it has not ended itself");

    nodes[2].kill();
    let mut rest = Vec::new();
    follow.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"", "cut off: an end would be a chunk of its own");
    let refused = logs(&nodes[0], "");
    assert_eq!((refused.status, refused.json()["error"].as_str()), (503, Some("unavailable")));
    assert!(refused.text().contains("the VM is on node three, which"), "{}", refused.text());
}

#[test]
fn a_stream_to_a_guest_that_is_not_ready_is_refused() {
    let (node, agent) = Node::with_agent(Manner::Manual);
    node.create(1, "a");
    agent.wait_for_plan(|plan| plan.vms.len() == 1).unwrap();
    let headers = [("Connection", "upgrade"), ("Upgrade", "blixard-stream")];
    let answer = node.ask("POST", &format!("{VMS}/a:exec"), &headers, b"");
    assert_eq!(answer.status, 409, "{}", answer.text());
    assert_eq!(node.ask("POST", &format!("{VMS}/nobody:exec"), &headers, b"").status, 404);
}

/// A running VM with a log, and the end of the log that is written.
fn logged(node: &Node, agent: &SimAgent) -> File {
    node.create(1, "a");
    node.get(&format!("{VMS}/a?wait=ready"));
    let path = node.folder.path().join("console.log");
    std::fs::write(&path, "one\ntwo\nthree\n").unwrap();
    agent.set_log(agent.plan().vms[0].vm, File::open(&path).unwrap());
    File::options().append(true).open(&path).unwrap()
}

#[test]
fn a_log_is_read_whole_or_from_its_last_lines() {
    let (node, agent) = Node::with_agent(Manner::Prompt);
    logged(&node, &agent);
    let text = |query: &str| node.get(&format!("{VMS}/a:logs{query}")).text();
    assert_eq!(text(""), "one\ntwo\nthree\n");
    assert_eq!(text("?tail=2"), "two\nthree\n");
    assert_eq!(text("?tail=0"), "");
}

#[test]
fn a_followed_log_tells_what_is_added_survives_a_new_beginning_and_ends_with_the_vm() {
    let (node, agent) = Node::with_agent(Manner::Prompt);
    let mut log = logged(&node, &agent);
    let mut reader = BufReader::new(node.open("GET", &format!("{VMS}/a:logs?follow=true&tail=1"), &[], 0));
    assert_eq!(read_head(&mut reader).0, 200);
    assert_eq!(read_chunk(&mut reader).unwrap(), b"three\n");
    log.write_all(b"four\n").unwrap();
    assert_eq!(read_chunk(&mut reader).unwrap(), b"four\n");
    log.set_len(0).unwrap();
    log.write_all(b"anew\n").unwrap();
    assert_eq!(read_chunk(&mut reader).unwrap(), b"anew\n");
    log.write_all(b"last words\n").unwrap();
    agent.happen(agent.plan().vms[0].vm, |vm| {
        vm.start = Start(1);
        vm.phase = Phase::Stopped;
    });
    let mut rest = Vec::new();
    while let Some(chunk) = read_chunk(&mut reader) {
        rest.extend(chunk);
    }
    assert_eq!(rest, b"last words\n");
}

#[test]
fn the_numbers_tell_of_vms_raft_and_requests() {
    let (node, _agent) = Node::with_agent(Manner::Prompt);
    node.create(1, "a");
    node.get(&format!("{VMS}/a?wait=ready"));
    let text = node.get("/metrics").text();
    for line in [
        "blixard_vms{phase=\"running\"} 1",
        "blixard_agent_up 1",
        "blixard_raft{what=\"leads\"} 1",
        "blixard_commands_total{command=\"create_vm\",done=\"true\"} 1",
        "blixard_requests_total{method=\"POST\",route=\"/v1/projects/{project}/vms\",status=\"201\"} 1",
        "blixard_build_info{node=\"one\"",
        "blixard_blob_bytes",
        "blixard_request_seconds_bucket",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
    let findings = node.get("/v1/doctor").json();
    assert!(findings.as_array().unwrap().iter().any(|f| f["check"] == "simulation"));
}
