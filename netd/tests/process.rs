//! The program itself: privileges, who may connect, being killed, and hosts where something is missing.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout))]

mod support;

use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

use blixard_ipc::Connection;
use blixard_netd_api::{NetdClient, NetdError, Problem, ProblemKind, Reply, Request};
use support::{Guest, default_network, ip, network, nft, nic, run, when_free};

const PROGRAM: &str = env!("CARGO_BIN_EXE_blixard-netd");
/// A user without any rights.
const NOBODY: &str =
    "--reuid 65534 --regid 65534 --clear-groups --inh-caps=-all,+net_admin --ambient-caps=+net_admin";

/// netd as a process of its own, in the network namespace of the test.
struct Netd {
    child: Child,
    log: BufReader<ChildStderr>,
    socket: PathBuf,
    _folder: tempfile::TempDir,
}

impl Netd {
    fn start(arguments: &str) -> Self {
        Self::start_by(Command::new(PROGRAM), arguments)
    }

    fn start_by(mut command: Command, arguments: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o777)).unwrap();
        let socket = folder.path().join("netd.sock");
        command.arg("--socket").arg(&socket).args(arguments.split_whitespace());
        let mut child = command.stderr(Stdio::piped()).env("NO_COLOR", "1").spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        let mut netd = Self { child, log, socket, _folder: folder };
        netd.wait_for("serving");
        netd
    }

    /// As a user with CAP_NET_ADMIN and nothing else.
    fn start_as_nobody() -> Self {
        let mut command = Command::new("setpriv");
        command.args(NOBODY.split_whitespace()).arg(PROGRAM);
        Self::start_by(command, "")
    }

    fn wait_for(&mut self, text: &str) -> String {
        loop {
            let mut line = String::new();
            assert!(self.log.read_line(&mut line).unwrap() > 0, "netd ended before it said {text}");
            if line.contains(text) {
                return line;
            }
        }
    }

    fn client(&self) -> NetdClient {
        NetdClient::new(&self.socket)
    }

    /// A line of /proc/PID/status.
    fn status(&self, key: &str) -> String {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with(&format!("{key}:"))).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    }
}

impl Drop for Netd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn problem(result: Result<impl Sized, NetdError>) -> Problem {
    match result.err().unwrap() {
        NetdError::Refused(problem) => problem,
        other => panic!("{other:?}"),
    }
}

/// Gives the test files of its own: a /dev/net/tun of this mode, or none.
fn own_device(mode: Option<u32>) {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    run("mount", "--make-rprivate /");
    run("mount", "-t tmpfs none /dev/net");
    if let Some(mode) = mode {
        run("mknod", "/dev/net/tun c 10 200");
        std::fs::set_permissions("/dev/net/tun", PermissionsExt::from_mode(mode)).unwrap();
    }
}

#[test]
fn started_as_root_it_keeps_one_capability() {
    if !support::namespace() {
        return;
    }
    let netd = Netd::start("");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(u64::from_str_radix(&netd.status(set), 16).unwrap(), 1 << 12, "{set}");
    }
    assert_eq!(netd.status("NoNewPrivs"), "1");
}

#[test]
fn one_capability_is_enough_for_everything() {
    if !support::namespace() {
        return;
    }
    own_device(Some(0o666));
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
    let netd = Netd::start_as_nobody();
    assert_eq!(netd.status("Uid"), "65534");
    let client = netd.client();
    client.ensure_network(&default_network()).unwrap();
    assert_eq!(std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap().trim(), "1");
    assert_eq!(std::fs::read_to_string("/proc/sys/net/ipv6/conf/all/forwarding").unwrap().trim(), "1");
    let (a, b) = (nic(1, "default", &["10.88.0.11"]), nic(2, "default", &["10.88.0.12"]));
    let mut guest = Guest::new(&a, client.open_nic(&a).unwrap());
    let mut other = Guest::new(&b, client.open_nic(&b).unwrap());
    let packet = support::ipv4(guest.v4, other.v4, 17, &support::udp(1, 2, b"over there"));
    guest.send(&support::ethernet(other.mac, guest.mac, support::IPV4, &packet));
    other.receive_until(b"over there");
    assert!(
        ip(&format!("-d link show {}", a.id)).contains("user 65534") || ip("-d link").contains("user nobody")
    );
    client.remove_nic(&a.id).unwrap();
    client.remove_nic(&b.id).unwrap();
    client.remove_network("default").unwrap();
    assert_eq!(nft("list ruleset"), "");
    assert!(!ip("-o link").contains("bx"));
}

#[test]
fn without_its_capability_it_says_so_and_ends() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o777)).unwrap();
    let mut command = Command::new(PROGRAM);
    if nix::unistd::geteuid().is_root() {
        command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", PROGRAM]);
    }
    let output = command.arg("--socket").arg(folder.path().join("s")).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("CAP_NET_ADMIN is missing"), "{error}");
}

#[test]
fn nobody_but_the_agent_is_answered() {
    if !support::namespace() {
        return;
    }
    let mut netd = Netd::start("--agent-uid 4242");
    // The connection is closed without an answer; whether the request could still be sent depends on who was first.
    assert!(matches!(netd.client().list(), Err(NetdError::Unreachable(_))));
    let line = netd.wait_for("refused a connection");
    assert!(line.contains("peer.uid=0"), "{line}");
}

#[test]
fn killed_at_any_time_it_goes_on_where_the_kernel_is() {
    if !support::namespace() {
        return;
    }
    let spec = nic(1, "default", &["10.88.0.11"]);
    let netd = Netd::start("");
    netd.client().ensure_network(&default_network()).unwrap();
    let tap = netd.client().open_nic(&spec).unwrap();
    drop(netd);
    let netd = Netd::start("");
    let list = netd.client().list().unwrap();
    assert_eq!(list.nics, [(spec.id.clone(), Some("default".into()))]);
    assert_eq!(problem(netd.client().open_nic(&spec)).kind, ProblemKind::Busy);
    let filter = nft("list ruleset");
    netd.client().ensure_network(&default_network()).unwrap();
    netd.client().ensure_nic(&spec).unwrap();
    assert_eq!(nft("list ruleset"), filter);
    drop(tap);
    let busy = |error: &NetdError| matches!(error, NetdError::Refused(p) if p.kind == ProblemKind::Busy);
    when_free(|| netd.client().open_nic(&spec), busy);
}

#[test]
fn a_socket_can_be_passed_by_systemd() {
    if !support::namespace() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("passed.sock");
    let listener = blixard_ipc::Listener::bind(&socket, 0o600).unwrap();
    let passed = Stdio::from(listener.as_fd().try_clone_to_owned().unwrap());
    let script = "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\"";
    let mut command = Command::new("sh");
    let mut child =
        command.args(["-c", script, PROGRAM]).stdin(passed).stderr(Stdio::null()).spawn().unwrap();
    assert!(NetdClient::new(&socket).list().is_ok());
    child.kill().unwrap();
    child.wait().unwrap();
    let (stream, _other) = UnixStream::pair().unwrap();
    let output =
        Command::new("sh").args(["-c", script, PROGRAM]).stdin(std::os::fd::OwnedFd::from(stream)).output();
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("not a listening unix socket"));
}

#[test]
fn a_host_without_nft_is_told_what_to_install() {
    if !support::namespace() {
        return;
    }
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    run("mount", "--make-rprivate /");
    let real = Path::new("/usr/sbin/nft").canonicalize().unwrap();
    // A folder over the file would not do: it is not a file any more, which is what netd sees.
    run("mount", &format!("--bind /dev/null {}", real.display()));
    let netd = Netd::start("");
    let problem = problem(netd.client().ensure_network(&default_network()));
    assert_eq!(problem.kind, ProblemKind::Kernel);
    assert!(problem.message.contains("install the package nftables"), "{problem}");
    assert!(!ip("-o link").contains("bx"));
}

#[test]
fn a_nic_that_fails_half_way_leaves_nothing() {
    if !support::namespace() {
        return;
    }
    own_device(None);
    let netd = Netd::start("");
    netd.client().ensure_network(&default_network()).unwrap();
    let filter = nft("list ruleset");
    let spec = nic(1, "default", &["10.88.0.11"]);
    let problem = problem(netd.client().open_nic(&spec));
    assert_eq!(problem.kind, ProblemKind::Kernel);
    assert!(problem.message.contains("/dev/net/tun"), "{problem}");
    assert_eq!(nft("list ruleset"), filter);
    assert!(netd.client().list().unwrap().nics.is_empty());
}

#[test]
fn a_switch_that_cannot_be_set_is_told_with_its_command() {
    if !support::namespace() {
        return;
    }
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    run("mount", "--make-rprivate /");
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
    run("mount", "--bind /proc/sys /proc/sys");
    run("mount", "-o remount,ro,bind /proc/sys");
    let netd = Netd::start("");
    let ask = || netd.client().ensure_network(&network("a", &["10.77.0.1/24"], true));
    let problem = problem(ask());
    assert!(problem.message.contains("sysctl -w net.ipv4.ip_forward=1"), "{problem}");
    assert!(!ip("-o link").contains("bx"), "nothing was made");
    run("mount", "-o remount,rw,bind /proc/sys");
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    run("mount", "-o remount,ro,bind /proc/sys");
    ask().unwrap();
}

#[test]
fn what_is_no_request_is_refused_and_does_no_harm() {
    if !support::namespace() {
        return;
    }
    let netd = Netd::start("");
    let soon = || Instant::now() + Duration::from_secs(10);
    let call = |message: &serde_json::Value| -> Option<Reply> {
        let connection = Connection::connect(&netd.socket).unwrap();
        connection.call(message, &[], soon()).ok().map(|(reply, _)| reply)
    };
    assert!(
        call(&serde_json::Value::String("x".repeat(100_000))).is_none(),
        "a long one ends the connection"
    );
    for text in
        ["null", "{}", "[]", r#"{"remove_nic":{"id":"eth0"}}"#, r#"{"remove_network":{"name":"../../x"}}"#]
    {
        match call(&serde_json::from_str(text).unwrap()) {
            Some(Reply::Refused(problem)) => {
                assert_eq!(problem.kind, ProblemKind::Invalid, "{text}: {problem}")
            }
            other => panic!("{text}: {other:?}"),
        }
    }
    assert!(call(&serde_json::to_value(Request::List).unwrap()).is_some());
}

#[test]
fn connections_that_say_nothing_are_ended_for_those_that_wait() {
    if !support::namespace() {
        return;
    }
    let netd = Netd::start("");
    let silent: Vec<Connection> = (0..8).map(|_| Connection::connect(&netd.socket).unwrap()).collect();
    netd.client().list().unwrap();
    drop(silent);
}

#[test]
fn many_callers_at_once_are_served_one_after_another() {
    if !support::namespace() {
        return;
    }
    let netd = Netd::start("");
    netd.client().ensure_network(&default_network()).unwrap();
    std::thread::scope(|scope| {
        for n in 1..=12 {
            let client = netd.client();
            scope.spawn(move || client.ensure_nic(&nic(n, "default", &[&format!("10.88.1.{n}")])).unwrap());
        }
    });
    assert_eq!(netd.client().list().unwrap().nics.len(), 12);
    let filter = nft("list set bridge blixard v4");
    assert_eq!(filter.matches("10.88.1.").count(), 12);
}
