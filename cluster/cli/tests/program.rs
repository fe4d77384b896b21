//! The program as a user starts it, against a node that says exactly what a test tells it to say.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, missing_docs)]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};

const ID: &str = "01ARZ3NDEKTSV4RRFFQ69G5FAV";

/// Reads one request per connection and gives the next answer; tells the first line of each request.
fn node(folder: &Path, answers: Vec<String>) -> Receiver<String> {
    let listener = UnixListener::bind(folder.join("node.sock")).unwrap();
    let (send, receive) = channel();
    std::thread::spawn(move || {
        for answer in answers {
            let (mut stream, _) = listener.accept().unwrap();
            let request = read_request(&mut stream);
            let _ = send.send(request);
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    receive
}

fn read_request(stream: &mut UnixStream) -> String {
    let mut bytes = vec![];
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let head = head.to_lowercase();
            let length =
                head.lines().find_map(|l| l.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
            let chunked = head.contains("transfer-encoding: chunked");
            if (chunked && body.ends_with("0\r\n\r\n")) || (!chunked && body.len() >= length) {
                return text;
            }
        }
        let mut buffer = [0; 65536];
        match stream.read(&mut buffer) {
            Ok(n) if n > 0 => bytes.extend_from_slice(&buffer[..n]),
            _ => return text,
        }
    }
}

fn answer(status: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

fn refusal(status: &str, kind: &str) -> String {
    let body = format!(
        r#"{{"error":"{kind}","message":"it is so","details":[],"request_id":"r1","suggestion":"try that","retryable":false}}"#
    );
    answer(status, &body)
}

fn vm(phase: &str, more: &str) -> String {
    format!(
        r#"{{"id":"{ID}","name":"web","project":"default","spec":{{"image":"i"}},"generation":1,"created_at_ms":1,
        "desired":"running","phase":"{phase}","epoch":1,"start":1,"image_digest":"sha256:0"{more}}}"#
    )
}

fn blixard(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_blixard"))
        .env("BLIXARD_HOST", folder.join("node.sock"))
        .env_remove("BLIXARD_PROJECT")
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn code_out_err(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

/// Runs against a node with these answers; what it answered, and the first lines of what it asked.
fn with(answers: Vec<String>, args: &[&str]) -> ((i32, String, String), Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    let asked = node(folder.path(), answers);
    let answered = code_out_err(&blixard(folder.path(), args));
    let first =
        |request: String| request.lines().next().unwrap_or_default().trim_end_matches(" HTTP/1.1").to_owned();
    (answered, asked.try_iter().map(first).collect())
}

#[test]
fn each_kind_of_refusal_has_its_exit_code_and_says_what_to_try() {
    for (status, kind, code) in [
        ("404 Not Found", "not_found", 3),
        ("409 Conflict", "conflict", 4),
        ("507 Full", "no_capacity", 5),
        ("408 Timeout", "timeout", 6),
        ("403 Forbidden", "denied", 7),
        ("422 Wrong", "validation_error", 1),
        ("500 Broken", "internal", 1),
    ] {
        let ((found, out, err), _) = with(vec![refusal(status, kind)], &["run", "-d", "img"]);
        assert_eq!((found, out.as_str()), (code, ""), "{status}: {err}");
        assert_eq!(err, format!("Error: it is so ({kind}, request r1)\nTry: try that\n"));
    }
}

#[test]
fn errors_are_json_when_the_output_is() {
    let ((code, _, err), _) =
        with(vec![refusal("404 Not Found", "not_found")], &["-o", "json", "inspect", "web"]);
    let error: serde_json::Value = serde_json::from_str(&err).unwrap();
    assert_eq!((code, error["error"].as_str(), error["exit_code"].as_u64()), (3, Some("not_found"), Some(3)));
    let ((code, _, err), _) = with(vec![], &["-o", "json", "ps", "--nonsense"]);
    let error: serde_json::Value = serde_json::from_str(&err).unwrap();
    assert_eq!((code, error["error"].as_str()), (2, Some("usage")));
}

#[test]
fn without_a_node_every_command_says_how_to_get_one() {
    let folder = tempfile::tempdir().unwrap();
    for args in [vec!["ps"], vec!["run", "-d", "img"], vec!["exec", "web", "true"], vec!["image", "ls"]] {
        let (code, _, err) = code_out_err(&blixard(folder.path(), &args));
        assert_eq!(code, 1, "{args:?}: {err}");
        assert!(err.contains("cannot connect to the node") && err.contains("blixard dev"), "{args:?}: {err}");
    }
    let (code, out, _) = code_out_err(&blixard(folder.path(), &["version"]));
    assert_eq!((code, out.starts_with("blixard ")), (0, true), "its own version needs no node");
}

#[test]
fn a_detached_run_prints_the_id_it_chose_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let asked = node(folder.path(), vec![answer("201 Created", &vm("pending", ""))]);
    let (code, out, err) =
        code_out_err(&blixard(folder.path(), &["run", "-d", "-m", "1G", "img", "sleep", "-x"]));
    assert_eq!((code, out, err), (0, format!("{ID}\n"), String::new()));
    let request = asked.recv().unwrap();
    let body: serde_json::Value = serde_json::from_str(request.split_once("\r\n\r\n").unwrap().1).unwrap();
    assert_eq!(body["spec"]["memory_mib"], 1024);
    assert_eq!(body["spec"]["command"], serde_json::json!(["sleep", "-x"]));
    assert_eq!(body["id"].as_str().map(str::len), Some(26), "the id is chosen here: {body}");
}

#[test]
fn a_waiting_run_tells_a_failure_after_the_id_and_names_the_reason() {
    let failed = vm("failed", r#","reason":"no such volume""#);
    let answers = vec![
        answer("201 Created", &vm("pending", "")),
        answer("200 OK", &vm("pending", "")),
        answer("200 OK", &failed),
    ];
    let ((code, out, err), asked) = with(answers, &["run", "-d", "--wait", "ready", "img"]);
    assert_eq!((code, out), (1, format!("{ID}\n")));
    assert!(err.contains("failed: no such volume") && err.contains("blixard logs web"), "{err}");
    assert!(asked[2].contains("wait=preparing,starting,running"), "{asked:?}");
}

#[test]
fn a_waiting_run_is_a_failure_when_the_guest_ends_badly_before_it_is_ready() {
    let run = |end: &str| {
        let answers = vec![
            answer("201 Created", &vm("pending", "")),
            answer("200 OK", &vm("starting", "")),
            answer("200 OK", &vm("stopped", end)),
        ];
        with(answers, &["run", "-d", "--wait", "ready", "img"]).0
    };
    let (code, out, err) = run(r#","exit":{"kind":"guest_fault","detail":"vCPU 0: triple fault"}"#);
    assert_eq!((code, out), (1, format!("{ID}\n")));
    assert!(err.contains("triple fault") && err.contains("blixard logs web"), "{err}");
    assert_eq!(run(r#","exit":{"kind":"reset"}"#).0, 1, "a kernel that panics");
    assert_eq!(run(r#","workload":{"code":3},"exit":{"kind":"power_off"}"#).0, 0, "short work is no failure");
}

#[test]
fn a_run_shows_the_console_and_ends_with_the_exit_code_of_the_workload() {
    let ended = vm("stopped", r#","workload":{"code":3},"exit":{"kind":"power_off"}"#);
    let log = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nsaid\n\r\n0\r\n\r\n".to_owned();
    let answers = vec![
        answer("201 Created", &vm("pending", "")),
        log,
        answer("200 OK", &ended),
        answer("200 OK", &ended),
        answer("202 Accepted", &ended),
        refusal("404 Not Found", "not_found"),
    ];
    let ((code, out, err), asked) = with(answers, &["run", "--rm", "img"]);
    assert_eq!((code, out.as_str(), err.as_str()), (3, "said\n", ""));
    let all = format!("/v1/projects/default/vms/{ID}");
    assert_eq!(asked[1], format!("GET {all}:logs?follow=true"));
    assert_eq!(asked[4], format!("DELETE {all}?force=true"));
}

#[test]
fn the_first_interrupt_stops_the_vm_and_its_end_is_still_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(folder.path().join("node.sock")).unwrap();
    let (send, asked) = channel();
    let (stop, stopped) = channel::<()>();
    std::thread::spawn(move || {
        let mut stopped = Some(stopped);
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let request = read_request(&mut stream);
            send.send(request.lines().next().unwrap().to_owned()).unwrap();
            let ended = vm("stopped", r#","workload":{"signal":15}"#);
            if request.contains(":logs") {
                // Like a VM that writes nothing and ends when it is stopped.
                let stopped = stopped.take().unwrap();
                std::thread::spawn(move || {
                    stopped.recv().unwrap();
                    stream.write_all(answer("200 OK", "").as_bytes()).unwrap();
                });
                continue;
            }
            if request.contains(":stop") {
                stop.send(()).unwrap();
            }
            let text = if request.starts_with("GET") { ended } else { vm("running", "") };
            stream.write_all(answer("200 OK", &text).as_bytes()).unwrap();
        }
    });
    let child = Command::new(env!("CARGO_BIN_EXE_blixard"))
        .env("BLIXARD_HOST", folder.path().join("node.sock"))
        .args(["run", "img"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while !asked.recv().unwrap().contains(":logs") {}
    // Twice at once, as `timeout` does it: to the process and to its group.
    for _ in 0..2 {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    }
    let (code, _, err) = code_out_err(&child.wait_with_output().unwrap());
    assert_eq!(code, 143, "the exit code of the workload: {err}");
    assert!(asked.try_iter().any(|request| request.contains(":stop")));
}

#[test]
fn several_vms_are_answered_in_order_and_one_error_does_not_keep_the_others_back() {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(folder.path().join("node.sock")).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let request = read_request(&mut stream);
            let text = if request.contains("/vms/nobody") {
                refusal("404 Not Found", "not_found")
            } else {
                let name = request.split("/vms/").nth(1).unwrap().split(':').next().unwrap();
                answer("200 OK", &vm("stopped", "").replace("\"web\"", &format!("\"{name}\"")))
            };
            stream.write_all(text.as_bytes()).unwrap();
        }
    });
    let (code, out, err) = code_out_err(&blixard(folder.path(), &["stop", "a", "nobody", "b"]));
    assert_eq!((code, out.as_str()), (3, "a\nb\n"));
    assert!(err.contains("it is so"), "{err}");
}

#[test]
fn lists_are_tables_names_or_json() {
    let page = || answer("200 OK", &format!(r#"{{"items":[{}],"revision":1}}"#, vm("running", "")));
    let ((_, out, _), _) = with(vec![page()], &["ps"]);
    assert!(out.starts_with("NAME") && out.contains("web") && out.contains("running"), "{out}");
    let ((_, out, _), _) = with(vec![page()], &["ps", "-q"]);
    assert_eq!(out, format!("{ID}\n"));
    let ((_, out, _), _) = with(vec![page()], &["ps", "-o", "name"]);
    assert_eq!(out, "web\n");
    let ((_, out, _), _) = with(vec![page()], &["ps", "-o", "json"]);
    let list: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(list[0]["name"], "web");
    let ((_, out, _), _) = with(vec![page()], &["ps", "-o", "yaml"]);
    assert!(out.starts_with("- ") && out.contains("name: web"), "{out}");
    let stopped = answer("200 OK", &format!(r#"{{"items":[{}],"revision":1}}"#, vm("stopped", "")));
    let ((_, out, _), _) = with(vec![stopped], &["ps", "-q"]);
    assert_eq!(out, "", "what has stopped is shown with -a only");
}

#[test]
fn exec_passes_streams_and_exit_code_through_an_upgraded_connection() {
    use blixard_vmm_api::guest::WorkloadExit;
    use blixard_vmm_api::guest::frame::{self, Frame};
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(folder.path().join("node.sock")).unwrap();
    let guest = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let head = read_request(&mut stream);
        assert!(head.starts_with("POST /v1/projects/default/vms/web:exec HTTP/1.1"), "{head}");
        let switch =
            "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: blixard-stream\r\n\r\n";
        stream.write_all(switch.as_bytes()).unwrap();
        let mut input = vec![];
        let command = loop {
            let mut header = [0; frame::HEADER];
            stream.read_exact(&mut header).unwrap();
            let (kind, length) = frame::decode_header(header).unwrap();
            let mut payload = vec![0; length];
            stream.read_exact(&mut payload).unwrap();
            match Frame::decode(kind, payload, |t| serde_json::from_slice(t).ok()).unwrap() {
                Frame::Start(request) => input.push(request.command.args.join(" ").into_bytes()),
                Frame::Stdin(bytes) if bytes.is_empty() => break input.concat(),
                Frame::Stdin(bytes) => input.push(bytes),
                other => panic!("{other:?}"),
            }
        };
        for frame in
            [Frame::Stdout(command), Frame::Stderr(b"bad".to_vec()), Frame::Exit(WorkloadExit::Signal(9))]
        {
            stream.write_all(&frame.encode(|_| None).unwrap()).unwrap();
        }
    });
    let mut child = Command::new(env!("CARGO_BIN_EXE_blixard"))
        .env("BLIXARD_HOST", folder.path().join("node.sock"))
        .args(["exec", "-i", "web", "cat", "-n"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b" typed").unwrap();
    let (code, out, err) = code_out_err(&child.wait_with_output().unwrap());
    guest.join().unwrap();
    assert_eq!((code, out.as_str(), err.as_str()), (137, "cat -n typed", "bad"));
}

#[test]
fn an_exec_whose_connection_breaks_is_a_failure_of_its_own() {
    let switch = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: blixard-stream\r\n\r\n";
    let ((code, _, err), _) =
        with(vec![switch.into(), answer("200 OK", &vm("stopped", ""))], &["exec", "web", "true"]);
    assert_eq!(code, 125, "{err}");
    assert!(err.contains("the VM is stopped"), "{err}");
}

#[test]
fn an_image_goes_up_from_a_file_a_pipe_and_a_folder() {
    let view =
        r#"{"name":"busybox","digest":"sha256:0","size_bytes":1,"fs":"erofs","created_at_ms":1,"config":{}}"#;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("busybox.tar");
    std::fs::write(&file, "content of a tar").unwrap();
    let asked = node(folder.path(), vec![answer("201 Created", view), answer("201 Created", view)]);
    let (code, out, err) =
        code_out_err(&blixard(folder.path(), &["image", "import", file.to_str().unwrap()]));
    assert_eq!((code, out.as_str(), err.as_str()), (0, "busybox\n", ""));
    let request = asked.recv().unwrap();
    assert!(request.starts_with("POST /v1/images?name=busybox HTTP/1.1"), "{request}");
    assert!(request.ends_with("\r\n\r\ncontent of a tar"), "{request}");
    let layout = folder.path().join("layout");
    std::fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    std::fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let (code, ..) = code_out_err(&blixard(folder.path(), &["image", "import", layout.to_str().unwrap()]));
    assert_eq!(code, 0);
    let request = asked.recv().unwrap();
    assert!(request.contains("imageLayoutVersion") && request.contains("oci-layout"), "a tar of the folder");
}

#[test]
fn completion_scripts_know_the_commands() {
    let folder = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let (code, out, _) = code_out_err(&blixard(folder.path(), &["completion", shell]));
        assert!(code == 0 && out.contains("inspect") && out.contains("doctor"), "{shell}");
    }
}
