//! The whole system on one host: stock kernel, real images, every process, as a user would drive it.
//!
//! Needs root, a `/dev/kvm` that runs Linux, cgroup v2 and our programs: `make test-rig` provides all of that in the rig
//! and sets `BLIXARD_WHOLE_SYSTEM`. Programs are in `/opt/blixard`, guest images in `/opt/images`, the guest kernel is the
//! host's cloud kernel.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, clippy::print_stdout)]

use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use blixard_tests::host::{Host, PageServer, traces};
use libtest_mimic::{Arguments, Failed, Trial};

const PROGRAMS: &str = "/opt/blixard";
static HOST: OnceLock<Host> = OnceLock::new();

fn main() -> std::process::ExitCode {
    let arguments = Arguments::from_args();
    if std::env::var_os("BLIXARD_WHOLE_SYSTEM").is_none() && !arguments.list {
        println!("skipped: whole system: runs in the rig (make test-rig)");
        return std::process::ExitCode::SUCCESS;
    }
    let tests: Vec<(&str, fn())> = vec![
        ("a_vm_boots_answers_exec_fetches_a_page_and_is_removed_without_trace", first_five_minutes),
        ("a_guest_has_the_processors_and_the_memory_it_was_given", sizes),
        ("a_reset_or_a_kernel_that_cannot_boot_ends_the_vm_with_its_reason", resets),
        ("a_debian_root_runs_its_own_programs_and_keeps_its_disk_over_a_restart", debian_root),
        ("one_mebibyte_through_exec_arrives_intact", exec_pipe),
        ("a_health_check_is_shown_and_an_unhealthy_vm_starts_again", health),
        ("exit_codes_and_signals_of_a_workload_are_told", exit_codes),
        ("a_vm_outlives_the_death_of_agent_node_and_netd", outlives_control_plane),
        ("an_agent_killed_at_any_moment_of_a_start_ends_up_with_one_running_vm", killed_at_any_moment),
        ("twenty_vms_run_at_once", twenty),
        ("bad_input_gets_a_reason_and_leaves_nothing_behind", bad_input),
        ("a_lost_volume_is_a_failure_with_its_name_not_a_new_disk", lost_volume),
    ];
    let trials = tests.into_iter().map(|(name, test)| {
        Trial::test(name, move || {
            std::panic::catch_unwind(test).map_err(|e| {
                tidy();
                let text = e.downcast_ref::<String>().cloned();
                Failed::from(
                    text.or_else(|| e.downcast_ref::<&str>().map(|s| (*s).into())).unwrap_or_default(),
                )
            })
        })
    });
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    if let Some(host) = HOST.get().filter(|_| conclusion.has_failed()) {
        let log = host.log();
        let tail: Vec<&str> = log.lines().rev().take(150).collect();
        println!("-- log of the node, its end:");
        tail.into_iter().rev().for_each(|l| println!("  | {l}"));
    }
    // A static is not dropped: stop the node in good order.
    if let Some(host) = HOST.get() {
        std::process::Command::new("kill").args(["-TERM", &host.pid().to_string()]).status().unwrap();
    }
    conclusion.exit_code()
}

/// The node that all tests share, with a kernel and two images.
fn host() -> &'static Host {
    HOST.get_or_init(|| {
        let host = Host::start(Path::new(PROGRAMS));
        let release = cloud_kernel();
        let kernel = format!("/boot/vmlinuz-{release}");
        let modules = format!("/lib/modules/{release}");
        host.blixard(&["kernel", "import", "--name", "default", "--kernel", &kernel, "--modules", &modules])
            .good();
        for name in ["busybox", "debian"] {
            host.blixard(&["image", "import", &format!("/opt/images/{name}.tar"), "--name", name]).good();
        }
        host
    })
}

fn cloud_kernel() -> String {
    let names = std::fs::read_dir("/lib/modules").unwrap().flatten();
    names.map(|e| e.file_name().to_string_lossy().into_owned()).find(|n| n.contains("cloud")).unwrap()
}

/// Removes what a failed test left, so that it does not fail the next ones.
fn tidy() {
    if let Some(host) = HOST.get() {
        for vm in host.blixard(&["ps", "-a", "-q"]).out.split_whitespace() {
            host.blixard(&["rm", "-f", vm]);
        }
    }
}

fn remove(vm: &str) {
    host().blixard(&["rm", "-f", vm]).good();
}

/// Nothing of a VM is left on the host; asks again until the deadline, because removal ends after `rm` has answered.
fn assert_no_traces() {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let found = traces(&host().state_folder());
        if found.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "left behind: {found:#?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn first_five_minutes() {
    let host = host();
    host.run("first", &[], "busybox", &["sh", "-c", "uname -r; exec sleep 100000"]);
    assert!(
        host.blixard(&["logs", "first"]).good().contains(&cloud_kernel()),
        "the kernel's version is on the console"
    );
    assert_eq!(host.exec("first", &["uname", "-r"]).trim(), cloud_kernel());
    assert_eq!(host.exec("first", &["hostname"]).trim(), "first");
    let page = PageServer::start("hello from the host");
    let route = host.exec("first", &["ip", "route"]);
    let gateway =
        route.lines().find_map(|l| l.strip_prefix("default via ")).unwrap().split(' ').next().unwrap();
    let url = format!("http://{gateway}:{}/", page.port);
    assert_eq!(host.exec("first", &["wget", "-q", "-O", "-", &url]).trim(), "hello from the host");
    let gateway6 = host.exec("first", &["ip", "-6", "route"]);
    let gateway6 = gateway6
        .lines()
        .find_map(|l| l.strip_prefix("default via "))
        .unwrap()
        .split(' ')
        .next()
        .unwrap()
        .to_owned();
    let url = format!("http://[{gateway6}]:{}/", page.port);
    assert_eq!(host.exec("first", &["wget", "-q", "-O", "-", &url]).trim(), "hello from the host");
    let list = host.blixard(&["ps"]).good();
    assert!(list.contains("first") && list.contains("running"), "{list}");
    let view = host.inspect("first");
    assert_eq!(view["phase"], "running");
    assert!(view["timing"]["boot"]["guest_ready_us"].is_u64(), "{view}");
    remove("first");
    assert_eq!(host.blixard(&["inspect", "first"]).code, 3);
    assert_no_traces();
}

fn sizes() {
    let host = host();
    for (vcpus, memory) in [("1", "64M"), ("2", "512M"), ("8", "256M"), ("1", "4G")] {
        let name = format!("size-{vcpus}-{}", memory.to_lowercase());
        host.run(&name, &["--vcpus", vcpus, "--memory", memory], "busybox", &["sleep", "100000"]);
        assert_eq!(host.exec(&name, &["nproc"]).trim(), vcpus);
        let meminfo = host.exec(&name, &["cat", "/proc/meminfo"]);
        let total: u64 = meminfo.split_whitespace().nth(1).unwrap().parse().unwrap();
        let asked: u64 =
            if memory == "4G" { 4 << 20 } else { memory.trim_end_matches('M').parse::<u64>().unwrap() << 10 };
        // The kernel keeps some for itself: its image, of which part is freed after its start, and page structures.
        assert!(total < asked && total > asked * 9 / 10 - (45 << 10), "{total} KiB of {asked}");
        remove(&name);
    }
    assert_no_traces();
}

fn resets() {
    let host = host();
    host.run("again", &[], "busybox", &["sleep", "100000"]);
    host.blixard(&["exec", "again", "reboot", "-f"]);
    // A reset is no end in good order: the wait ends, with an error that says so.
    let answer = host.blixard(&["wait", "--for", "stopped", "--timeout", "60s", "again"]);
    assert!(answer.err.contains("reset"), "{answer:?}");
    assert_eq!(host.inspect("again")["exit"]["kind"], "reset");
    remove("again");
    // A kernel that panics says so on the console, and its VM ends instead of hanging.
    host.run("panics", &[], "busybox", &["sleep", "100000"]);
    host.blixard(&["exec", "panics", "sh", "-c", "echo c >/proc/sysrq-trigger"]);
    let answer = host.blixard(&["wait", "--for", "stopped", "--timeout", "60s", "panics"]);
    assert!(answer.err.contains("reset"), "{answer:?}");
    assert!(host.blixard(&["logs", "panics"]).good().contains("Kernel panic"));
    remove("panics");
    // Memory in which the kernel does not even fit is refused with both numbers.
    let answer = host.blixard(&["run", "--name", "small", "--memory", "32M", "busybox", "true"]);
    assert_ne!(answer.code, 0, "{answer:?}");
    assert!(answer.err.contains("kernel") && answer.err.contains("32 MiB"), "{answer:?}");
    remove("small");
    assert_no_traces();
}

fn debian_root() {
    let host = host();
    host.run("deb", &["--memory", "256M", "--disk", "256M"], "debian", &["sleep", "100000"]);
    assert!(host.exec("deb", &["cat", "/etc/os-release"]).contains("bookworm"));
    assert!(host.exec("deb", &["dpkg", "-l", "bash"]).contains("ii"));
    host.exec("deb", &["sh", "-c", "echo kept > /root/file; sync"]);
    host.blixard(&["stop", "deb"]).good();
    assert_eq!(host.inspect("deb")["phase"], "stopped");
    host.blixard(&["start", "--wait", "ready", "deb"]).good();
    assert_eq!(host.exec("deb", &["cat", "/root/file"]).trim(), "kept");
    // The image below is shared and cannot be changed from inside.
    let full = host.blixard(&["exec", "deb", "dd", "if=/dev/zero", "of=/root/full", "bs=1M", "count=400"]);
    assert_ne!(full.code, 0, "a disk of 256 MiB takes no 400 MiB");
    remove("deb");
    assert_no_traces();
}

fn exec_pipe() {
    let host = host();
    host.run("pipe", &[], "busybox", &["sleep", "100000"]);
    let input: Vec<u8> = (0..1u32 << 18).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    assert_eq!(input.len(), 1 << 20);
    let expected = {
        let file = Path::new("/run/blixard-test-input");
        std::fs::write(file, &input).unwrap();
        let out = std::process::Command::new("sha256sum").arg(file).output().unwrap();
        std::fs::remove_file(file).unwrap();
        String::from_utf8(out.stdout).unwrap().split(' ').next().unwrap().to_owned()
    };
    let answer = host.blixard_with_input(&["exec", "-i", "pipe", "sha256sum"], &input).good();
    assert_eq!(answer.split(' ').next().unwrap(), expected);
    let back = host.blixard_with_input(&["exec", "-i", "pipe", "wc", "-c"], &input).good();
    assert_eq!(back.trim(), "1048576");
    assert_eq!(host.blixard(&["exec", "pipe", "sh", "-c", "exit 7"]).code, 7);
    assert_eq!(host.blixard(&["exec", "pipe", "no-such-program"]).code, 127);
    let both = host.blixard(&["exec", "pipe", "sh", "-c", "echo out; echo err >&2"]);
    assert_eq!((both.out.trim(), both.err.trim()), ("out", "err"));
    remove("pipe");
}

fn health() {
    let host = host();
    let options = [
        "--health-cmd",
        "test -e /well",
        "--health-interval",
        "500ms",
        "--health-retries",
        "2",
        "--restart",
        "on-failure",
    ];
    host.run("well", &options, "busybox", &["sh", "-c", "touch /well; exec sleep 100000"]);
    host.blixard(&["wait", "--for", "healthy", "--timeout", "60s", "well"]).good();
    let list = host.blixard(&["ps"]).good();
    assert!(list.contains("running (healthy)"), "{list}");
    host.exec("well", &["rm", "/well"]);
    let deadline = Instant::now() + Duration::from_secs(60);
    while host.inspect("well")["start"] != 2 {
        assert!(Instant::now() < deadline, "not started again: {}", host.inspect("well"));
        std::thread::sleep(Duration::from_millis(100));
    }
    host.blixard(&["wait", "--for", "healthy", "--timeout", "90s", "well"]).good();
    remove("well");
    assert_no_traces();
}

fn exit_codes() {
    let host = host();
    let answer = host.blixard(&["run", "--name", "three", "busybox", "sh", "-c", "echo said; exit 3"]);
    assert_eq!(answer.code, 3, "{answer:?}");
    assert!(answer.out.contains("said"), "{answer:?}");
    assert_eq!(host.inspect("three")["phase"], "stopped");
    assert_eq!(host.inspect("three")["workload"]["code"], 3);
    remove("three");
    let answer = host.blixard(&["run", "--rm", "busybox", "no-such-program"]);
    assert_eq!(answer.code, 127, "{answer:?}");
    let answer = host.blixard(&["run", "--rm", "busybox", "sh", "-c", "kill -TERM $$"]);
    assert_eq!(answer.code, 143, "{answer:?}");
    assert_no_traces();
}

fn pid_of(program: &str) -> Vec<String> {
    let output = std::process::Command::new("pgrep").args(["-x", program]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().split_whitespace().map(str::to_owned).collect()
}

fn kill_and_wait(program: &str) {
    let before = pid_of(program);
    assert!(!before.is_empty(), "{program} runs");
    for pid in &before {
        std::process::Command::new("kill").args(["-KILL", pid]).status().unwrap();
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    while pid_of(program).is_empty() || pid_of(program).iter().any(|p| before.contains(p)) {
        assert!(Instant::now() < deadline, "{program} was not started again");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn uptime(vm: &str) -> f64 {
    host().exec(vm, &["cat", "/proc/uptime"]).split(' ').next().unwrap().parse().unwrap()
}

/// Repeats a command until it succeeds: the control plane may need a moment after its death.
fn eventually(args: &[&str]) -> String {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let answer = host().blixard(args);
        if answer.code == 0 {
            return answer.out;
        }
        assert!(Instant::now() < deadline, "{answer:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn outlives_control_plane() {
    let host = host();
    host.run("alive", &[], "busybox", &["sleep", "100000"]);
    let (mut before, pid) = (uptime("alive"), host.inspect("alive")["start"].clone());
    let vmm = pid_of("blixard-vmm");
    for program in ["blixard-agent", "blixard-node", "blixard-netd"] {
        kill_and_wait(program);
        eventually(&["exec", "alive", "true"]);
        let now = uptime("alive");
        assert!(
            now > before,
            "after the death of {program} the guest's uptime goes on: {now} after {before}"
        );
        before = now;
        assert_eq!(pid_of("blixard-vmm"), vmm, "the same VMM runs after the death of {program}");
    }
    assert_eq!(host.inspect("alive")["start"], pid);
    eventually(&["rm", "-f", "alive"]);
    assert_no_traces();
}

fn killed_at_any_moment() {
    let host = host();
    for (i, delay_ms) in [0, 20, 50, 100, 200, 400, 800].into_iter().enumerate() {
        let name = format!("moment-{i}");
        host.blixard(&["run", "-d", "--name", &name, "busybox", "sleep", "100000"]).good();
        // A moment in time is what is varied here.
        std::thread::sleep(Duration::from_millis(delay_ms));
        kill_and_wait("blixard-agent");
        eventually(&["wait", "--for", "ready", "--timeout", "120s", &name]);
        assert_eq!(pid_of("blixard-vmm").len(), 1, "one VMM for one VM");
        eventually(&["rm", "-f", &name]);
        assert_no_traces();
    }
}

fn twenty() {
    let host = host();
    let names: Vec<String> = (0..20).map(|i| format!("many-{i}")).collect();
    for name in &names {
        host.blixard(&["run", "-d", "--memory", "96M", "--name", name, "busybox", "sleep", "100000"]).good();
    }
    for name in &names {
        let answer = host.blixard(&["wait", "--for", "ready", "--timeout", "400s", name]);
        assert_eq!(
            answer.code,
            0,
            "{answer:?}\n{}\n{}",
            host.inspect(name),
            host.blixard(&["logs", name]).out
        );
    }
    let mut addresses: Vec<String> = names
        .iter()
        .map(|n| host.exec(n, &["hostname", "-i"]).split_whitespace().next().unwrap_or_default().to_owned())
        .collect();
    addresses.sort();
    addresses.dedup();
    assert_eq!(pid_of("blixard-vmm").len(), 20);
    let shown = host.blixard(&["ps", "-o", "json"]).json();
    assert_eq!(shown.as_array().map(Vec::len), Some(20), "{shown}");
    let args: Vec<&str> = ["rm", "-f"].into_iter().chain(names.iter().map(String::as_str)).collect();
    host.blixard(&args).good();
    assert_no_traces();
}

fn bad_input() {
    let host = host();
    let refused = |args: &[&str], code: i32, words: &[&str]| {
        let answer = host.blixard(args);
        assert_eq!(answer.code, code, "{args:?}: {answer:?}");
        for word in words {
            assert!(answer.err.contains(word), "{args:?}: {word:?} is missing in {answer:?}");
        }
    };
    refused(&["run", "-d", "--vcpus", "0", "busybox"], 1, &["vcpus", "32"]);
    refused(&["run", "-d", "--vcpus", "10000", "busybox"], 1, &["vcpus", "32"]);
    refused(&["run", "-d", "--memory", "900G", "busybox"], 5, &["MiB"]);
    refused(&["run", "-d", "--disk", "1M", "busybox"], 1, &["disk", "16"]);
    refused(&["run", "-d", "no-such-image"], 3, &["no-such-image", "image import"]);
    refused(&["run", "-d", "--kernel", "nix", "busybox"], 3, &["nix", "kernel"]);
    refused(&["run", "-d", "--name", "Bad Name", "busybox"], 1, &["name"]);
    refused(&["exec", "nobody", "true"], 3, &["nobody"]);
    host.run("twice", &[], "busybox", &["sleep", "100000"]);
    refused(&["run", "-d", "--name", "twice", "busybox"], 4, &["twice"]);
    refused(&["rm", "twice"], 4, &["stop", "-f"]);
    remove("twice");
    let scratch = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = scratch.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_string_lossy().into_owned()
    };
    let not_a_kernel = file("vmlinuz", &[7; 100_000]);
    let modules = format!("/lib/modules/{}", cloud_kernel());
    refused(
        &["kernel", "import", "--name", "bad", "--kernel", &not_a_kernel, "--modules", &modules],
        1,
        &["kernel"],
    );
    let whole = std::fs::read("/opt/images/busybox.tar").unwrap();
    let truncated = file("truncated.tar", &whole[..whole.len() / 2]);
    refused(&["image", "import", &truncated, "--name", "bad"], 1, &["truncated", "bin/busybox"]);
    assert!(!host.blixard(&["image", "ls"]).good().contains("bad"));
    assert!(!host.blixard(&["kernel", "ls"]).good().contains("bad"));
    // Straight to the API: an unknown field, and a body that claims 2 GiB.
    let socket = host.run_folder().join("node.sock");
    let curl = |args: &[&str]| {
        let mut command = std::process::Command::new("curl");
        command.args(["-s", "-S", "-m", "20", "--unix-socket"]).arg(&socket).args(args);
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    };
    let vms = "http://node/v1/projects/default/vms";
    let body = r#"{"id":"01ARZ3NDEKTSV4RRFFQ69G5FAV","spec":{"image":"busybox","cpus":1}}"#;
    let answer = curl(&["-H", "Content-Type: application/json", "-d", body, vms]);
    assert!(answer.contains("cpus") && answer.contains("unknown"), "{answer}");
    let answer = curl(&[
        "-w",
        "%{http_code}",
        "-X",
        "POST",
        "-H",
        "Content-Length: 2147483648",
        "-H",
        "Expect:",
        "-d",
        "{",
        vms,
    ]);
    assert!(answer.contains("413"), "{answer}");
    assert_eq!(host.blixard(&["ps", "-a", "-q"]).good().trim(), "");
    assert_no_traces();
}

fn lost_volume() {
    let host = host();
    host.run("lost", &[], "busybox", &["sleep", "100000"]);
    host.blixard(&["stop", "lost"]).good();
    let id = host.inspect("lost")["id"].as_str().unwrap().to_owned();
    let volumes = host.state_folder().join("agent/volumes");
    let file = std::fs::read_dir(&volumes)
        .unwrap()
        .flatten()
        .find(|e| e.file_name().to_string_lossy().contains(&id));
    std::fs::remove_file(file.unwrap().path()).unwrap();
    host.blixard(&["start", "lost"]);
    let answer = host.blixard(&["wait", "--for", "ready", "--timeout", "30s", "lost"]);
    assert_ne!(answer.code, 0, "{answer:?}");
    let view = host.inspect("lost");
    assert_eq!(view["phase"], "failed", "{view}");
    assert!(view["reason"].as_str().is_some_and(|r| r.contains("volume")), "{view}");
    remove("lost");
    assert_no_traces();
}
