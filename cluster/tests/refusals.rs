//! What bad input gets: a status, the field, the reason, and what to try.
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

use std::io::Write;

use blixard_tests::sim_agent::Manner;
use common::{Answer, Node, VMS, create, id};
use serde_json::{Value, json};

fn spec(change: &Value) -> Value {
    let mut spec = json!({"image": "img"});
    for (key, value) in change.as_object().unwrap() {
        spec[key] = value.clone();
    }
    json!({"id": id(1), "name": "a", "spec": spec})
}

#[test]
fn each_wrong_field_is_named_with_its_reason() {
    let (node, _agent) = Node::with_agent(Manner::Manual);
    let long = "x".repeat(129);
    let labels: Value =
        (0..65).map(|n| (format!("k{n}"), json!("v"))).collect::<serde_json::Map<_, _>>().into();
    for (change, field, code) in [
        (json!({"vcpus": 0}), "spec.vcpus", "out_of_range"),
        (json!({"vcpus": 33}), "spec.vcpus", "out_of_range"),
        (json!({"vcpus": 10_000}), "spec.vcpus", "out_of_range"),
        (json!({"vcpus": -1}), "spec.vcpus", "out_of_range"),
        (json!({"vcpus": "two"}), "spec.vcpus", "bad_format"),
        (json!({"memory_mib": 31}), "spec.memory_mib", "out_of_range"),
        (json!({"disk_mib": 15}), "spec.disk_mib", "out_of_range"),
        (json!({"disk_mib": 16_777_217}), "spec.disk_mib", "out_of_range"),
        (json!({"image": "nope"}), "spec.image", "not_found"),
        (json!({"kernel": "nope"}), "spec.kernel", "not_found"),
        (json!({"network": "nope"}), "spec.network", "not_found"),
        (json!({"cmdline": "a\nb"}), "spec.cmdline", "bad_format"),
        (json!({"cwd": "relative"}), "spec.cwd", "bad_format"),
        (json!({"user": "a b"}), "spec.user", "bad_format"),
        (json!({"env": {"A=B": "c"}}), "spec.env", "bad_format"),
        (json!({"command": ["a\u{0}b"]}), "spec.command", "bad_format"),
        (json!({"command": [1]}), "spec.command[0]", "bad_format"),
        (json!({"labels": {"": "v"}}), "spec.labels", "bad_format"),
        (json!({"labels": {"k": long}}), "spec.labels", "bad_format"),
        (json!({"labels": labels}), "spec.labels", "out_of_range"),
        (json!({"cpus": 2}), "spec.cpus", "unknown"),
    ] {
        let answer = node.post(VMS, &spec(&change));
        assert_eq!(answer.status, 422, "{change}: {}", answer.text());
        assert_eq!(answer.details(), [(field.to_owned(), code.to_owned())], "{change}");
        assert!(answer.json()["message"].as_str().unwrap().contains(field), "{}", answer.text());
    }
    assert!(node.get(VMS).json()["items"].as_array().unwrap().is_empty(), "nothing was left behind");
}

#[test]
fn all_wrong_fields_are_named_at_once() {
    let (node, _agent) = Node::with_agent(Manner::Manual);
    let body = json!({"id": id(1), "name": "A!", "spec": {"image": "nope", "vcpus": 10_000, "memory_mib": 1, "bad": 1}});
    let answer = node.post(VMS, &body);
    let fields: Vec<String> = answer.details().into_iter().map(|(field, _)| field).collect();
    assert_eq!(fields, ["name", "spec.bad", "spec.image", "spec.memory_mib", "spec.vcpus"]);
    assert!(answer.json()["suggestion"].as_str().unwrap().contains("image"));
}

#[test]
fn more_memory_than_the_node_has_is_no_capacity_with_both_numbers() {
    let (node, agent) = Node::with_agent(Manner::Manual);
    agent.set_memory(2000);
    let much = spec(&json!({"memory_mib": 2_000_000}));
    node.until("the node knows", || node.post(VMS, &much).text().contains("2000 MiB"));
    let answer = node.post(VMS, &spec(&json!({"memory_mib": 2001}))).json();
    assert_eq!(answer["error"], "no_capacity");
    let message = answer["message"].as_str().unwrap();
    assert!(message.contains("2001") && message.contains("2000"), "{message}");
    assert_eq!(node.post(VMS, &spec(&json!({"memory_mib": 2000}))).status, 201);
}

#[test]
fn a_name_or_an_id_twice_is_a_conflict() {
    let (node, _agent) = Node::with_agent(Manner::Manual);
    node.create(1, "a");
    let twice = node.post(VMS, &create(2, "a"));
    assert_eq!((twice.status, &twice.json()["error"]), (409, &json!("conflict")));
    assert!(twice.json()["suggestion"].is_string());
    assert_eq!(node.post(VMS, &create(1, "b")).status, 409);
}

#[test]
fn what_is_no_request_of_this_api_is_told_so_in_one_shape() {
    let node = Node::alone();
    let shape = |answer: &Answer, status: u16, error: &str| {
        let body = answer.json();
        assert_eq!((answer.status, &body["error"]), (status, &json!(error)), "{}", answer.text());
        let id = body["request_id"].as_str().unwrap();
        assert_eq!((id.len(), answer.header("blixard-request-id").as_deref()), (26, Some(id)));
        assert!(answer.header("blixard-revision").is_some());
    };
    shape(&node.get("/nothing"), 404, "not_found");
    shape(&node.ask("PATCH", "/v1/version", &[], b""), 405, "method_not_allowed");
    shape(&node.ask("POST", VMS, &[], b"{"), 400, "malformed_request");
    shape(&node.ask("POST", VMS, &[], b"[]"), 400, "malformed_request");
    shape(&node.ask("POST", VMS, &[], b"\xff\xfe"), 400, "malformed_request");
    shape(&node.ask("POST", VMS, &[], b"{}"), 422, "validation_error");
    shape(&node.get(&format!("{VMS}?limit=0")), 422, "validation_error");
    shape(&node.get(&format!("{VMS}?limt=1")), 422, "validation_error");
    shape(&node.get(&format!("{VMS}?cursor=..%2F")), 422, "validation_error");
    shape(&node.get(&format!("{VMS}/a:explode")), 404, "not_found");
    shape(&node.ask("POST", &format!("{VMS}/a:exec"), &[], b""), 400, "malformed_request");
    shape(&node.get("/v1/watch?after=999999"), 410, "compacted");
    shape(
        &node.ask("POST", "/v1/projects/NO/vms", &[], create(1, "a").to_string().as_bytes()),
        422,
        "validation_error",
    );
}

#[test]
fn a_body_of_two_gib_is_refused_at_its_length_and_not_read() {
    let node = Node::alone();
    let stream = node.open("POST", VMS, &[], 2 << 30);
    let answer = Answer::read(stream);
    assert_eq!((answer.status, &answer.json()["error"]), (413, &json!("too_large")));
    assert_eq!(answer.header("connection").as_deref(), Some("close"));
}

#[test]
fn a_body_that_does_not_tell_its_length_is_refused_where_the_limit_is_passed() {
    let node = Node::alone();
    let mut stream = node.open("POST", VMS, &[("Transfer-Encoding", "chunked")], 0);
    let chunk = [b"10000\r\n".to_vec(), vec![b' '; 0x10000], b"\r\n".to_vec()].concat();
    let mut sent = 0usize;
    // The node closes the connection some time after the limit; it must not take 2 GiB.
    while sent < 2 << 30 && stream.write_all(&chunk).is_ok() {
        sent += 0x10000;
    }
    assert!(sent < 64 << 20, "{sent} bytes were taken");
    assert_eq!(node.get("/v1/version").status, 200);
}

#[test]
fn uploads_that_are_no_images_leave_nothing_behind() {
    let node = Node::alone();
    for (what, bytes) in [
        ("empty", Vec::new()),
        ("text", b"hello, I am no tar".to_vec()),
        ("truncated", common::image()[..700].to_vec()),
        ("a kernel that is none", common::kernel()[..2048].to_vec()),
    ] {
        let image = node.ask("POST", "/v1/images?name=x", &[], &bytes);
        let kernel = node.ask("POST", "/v1/kernels?name=x", &[], &bytes);
        if what != "empty" {
            assert_eq!(image.status, 422, "{what}: {}", image.text());
        }
        assert_eq!(kernel.status, 422, "{what}: {}", kernel.text());
        assert!(kernel.json()["suggestion"].is_string());
    }
    assert_eq!(node.get("/v1/images/x").status, 404);
    assert_eq!(
        node.ask("POST", "/v1/images", &[], &common::image()).details(),
        [("name".into(), "required".into())]
    );
    assert_eq!(node.ask("POST", "/v1/images?name=UP", &[], &common::image()).status, 422);
    let spool = node.folder.path().join("state/spool");
    assert_eq!(std::fs::read_dir(spool).unwrap().count(), 0);
}

#[test]
fn an_upload_that_cannot_fit_is_refused_before_it_is_read() {
    let node = Node::alone();
    let huge = (1u64 << 40).to_string();
    let refused =
        |length: &str| Answer::read(node.open("POST", "/v1/images?name=x", &[("Content-Length", length)], 0));
    assert_eq!(refused(&huge).status, 413);
    let answer = refused(&(64u64 << 30).to_string());
    // Where there are 64 GiB to spare the node would rightly wait for the upload; there is nothing to see then.
    let free = nix::sys::statvfs::statvfs(node.folder.path()).unwrap();
    if free.blocks_available() * free.fragment_size() < 64 << 30 {
        assert_eq!((answer.status, &answer.json()["error"]), (507, &json!("no_capacity")));
    }
}

#[test]
fn content_in_use_is_not_deleted_and_says_who_uses_it() {
    let (node, agent) = Node::with_agent(Manner::Prompt);
    node.create(1, "user");
    let refused = node.delete("/v1/images/img");
    assert_eq!(refused.status, 409);
    assert!(refused.json()["message"].as_str().unwrap().contains("user"));
    assert_eq!(node.delete("/v1/kernels/default").status, 409);
    node.delete(&format!("{VMS}/user?force=true"));
    agent.wait_for_plan(|plan| plan.vms.is_empty()).unwrap();
    assert_eq!(node.get(&format!("{VMS}/user?wait=gone")).status, 404);
    assert_eq!(node.delete("/v1/images/img").status, 200);
    assert_eq!(node.get("/v1/images/img").status, 404);
    let blobs = node.folder.path().join("state/blobs");
    node.until("the content is gone", || std::fs::read_dir(&blobs).unwrap().count() == 2);
}

#[test]
fn without_any_kernel_the_hosts_own_is_taken_or_the_way_to_one_is_told() {
    let node = Node::alone();
    assert_eq!(node.ask("POST", "/v1/images?name=img", &[], &common::image()).status, 201);
    let answer = node.post(VMS, &create(1, "a"));
    if answer.status == 201 {
        assert_eq!(node.get("/v1/kernels/default").status, 200);
    } else {
        assert_eq!(answer.status, 404, "{}", answer.text());
        assert!(answer.json()["message"].as_str().unwrap().contains("kernel"));
        assert!(answer.json()["suggestion"].as_str().unwrap().contains("kernel import"));
        assert_eq!(node.get(VMS).json()["items"], json!([]));
    }
}

#[test]
fn what_a_web_page_could_make_a_browser_send_is_denied_on_tcp() {
    use std::net::TcpStream;
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let node = Node::with_arguments(&["--listen", &format!("127.0.0.1:{port}")]);
    let ask = |head: &str| {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        write!(stream, "GET /v1/version HTTP/1.1\r\nConnection: close\r\n{head}\r\n").unwrap();
        let mut answer = String::new();
        std::io::Read::read_to_string(&mut stream, &mut answer).unwrap();
        answer[9..12].to_owned()
    };
    assert_eq!(ask("Host: localhost\r\n"), "200");
    assert_eq!(ask(&format!("Host: 127.0.0.1:{port}\r\n")), "200");
    assert_eq!(ask("Host: rebound.example\r\n"), "403");
    assert_eq!(ask("Host: localhost\r\nOrigin: http://example.org\r\n"), "403");
    drop(node);
}
