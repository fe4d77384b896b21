//! The cases.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Write};

use blixard_agent::lease::boottime_ms;
use blixard_agent_api::plan::OnLeaseEnd;
use blixard_agent_api::{AgentError, Generation, Phase, ProblemKind, Run, Start, VmPlan};
use blixard_vmm_api::ExitReason;
use nix::fcntl::{OFlag, open as open_with};
use nix::sys::stat::Mode;

use super::agent::{Agent, CONTENT, blob, of, plan, vm};

pub const ALL: &[(&str, fn())] = &[
    ("a_planned_vm_waits_for_its_content_then_runs_and_leaves_nothing", runs_and_leaves_nothing),
    ("a_jailed_process_has_what_it_was_handed_and_nothing_else", jail),
    ("a_killed_agent_adopts_its_vms_and_starts_none_twice", adopts),
    ("twenty_vms_start_at_once_each_with_its_own_user", twenty),
    ("a_start_runs_once_and_the_next_one_again", starts),
    ("a_guest_that_does_not_stop_is_killed_when_its_time_is_over", stubborn),
    ("a_vmm_that_ends_without_a_record_is_a_failure_with_its_last_words", silent),
    ("a_missing_or_small_volume_is_a_failure_and_never_made_anew", volumes),
    ("a_volume_without_room_waits_with_a_clear_reason", no_room),
    ("content_that_is_not_what_was_announced_is_refused", content),
    ("old_plans_and_impossible_ones_are_refused_with_the_field", plans),
    ("a_vm_removed_while_the_agent_was_dead_leaves_nothing", removed_while_dead),
    ("at_the_end_of_the_lease_what_may_run_elsewhere_is_frozen_until_it_is_renewed", lease),
    ("a_caller_that_is_not_the_node_is_cut_off", wrong_caller),
];

/// The letter of a process's state (`proc_pid_stat(5)`, field 3).
fn state(pid: i32) -> char {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    text.rsplit_once(") ").unwrap().1.chars().next().unwrap()
}

fn lease() {
    let mut agent = Agent::new();
    with_content(&agent);
    let freeze = OnLeaseEnd::Freeze;
    let a = VmPlan { on_lease_end: freeze, ..vm(1, "a") };
    let (b, c) = (vm(2, "b"), VmPlan { on_lease_end: freeze, ..vm(3, "c") });
    agent.client.apply(plan(1, &[a.clone(), b.clone()])).unwrap();
    let first = agent.until_phase(a.vm, Phase::Running);
    agent.until_phase(b.vm, Phase::Running);
    assert!(!agent.client.observe(0, 0, 0).unwrap().leased);

    let older = agent.client.renew(Some(boottime_ms() + 300), Generation(2));
    assert!(matches!(older, Err(AgentError::Refused(p)) if p.kind == ProblemKind::NotNow));
    let long = agent.client.renew(Some(u64::MAX), Generation(1));
    assert!(matches!(long, Err(AgentError::Refused(p)) if p.kind == ProblemKind::Invalid));
    assert!(!agent.client.observe(0, 0, 0).unwrap().leased);
    agent.client.renew(Some(boottime_ms() + 300), Generation(1)).unwrap();
    let frozen = agent.until_phase(a.vm, Phase::Paused);
    assert!(frozen.reason.unwrap().contains("lease"));
    assert_eq!(state(first.vmm_pid.unwrap()), 'T');
    assert_eq!(agent.until_phase(b.vm, Phase::Running).phase, Phase::Running, "it waits");

    // A new agent freezes again, and starts nothing that may run elsewhere.
    agent.client.apply(plan(2, &[a.clone(), b.clone(), c.clone()])).unwrap();
    agent.restart();
    agent.until_phase(a.vm, Phase::Paused);
    assert_eq!(agent.vmms().len(), 2);
    agent.client.renew(Some(boottime_ms() + 600_000), Generation(2)).unwrap();
    assert_eq!(agent.until_phase(a.vm, Phase::Running).vmm_pid, first.vmm_pid, "thawed, not started again");
    agent.until_phase(c.vm, Phase::Running);

    // After a boot the moment is lost, but not that there are leases.
    agent.kill();
    std::fs::remove_file(agent.folder.path().join("run/lease.json")).unwrap();
    agent.start();
    agent.until_phase(a.vm, Phase::Paused);
    assert_eq!(state(first.vmm_pid.unwrap()), 'T');
    assert!(agent.client.observe(0, 0, 0).unwrap().leased);
    agent.client.renew(Some(boottime_ms() + 600_000), Generation(2)).unwrap();
    agent.until_phase(a.vm, Phase::Running);

    // What was placed elsewhere meanwhile is ended without being thawed.
    agent.client.renew(None, Generation(2)).unwrap();
    agent.client.renew(Some(1), Generation(2)).unwrap();
    agent.until_phase(a.vm, Phase::Paused);
    agent.client.apply(plan(3, std::slice::from_ref(&b))).unwrap();
    agent.until("only the one that waits", |report| report.vms.len() == 1);
    assert_eq!(agent.vmms().len(), 1);
}

fn with_content(agent: &Agent) {
    for part in CONTENT {
        agent.put(part);
    }
}

fn files(agent: &Agent) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for folder in ["state/vm", "state/volumes", "run/vm"] {
        for entry in std::fs::read_dir(agent.path(folder)).unwrap() {
            found.insert(format!("{folder}/{}", entry.unwrap().file_name().to_str().unwrap()));
        }
    }
    found
}

fn runs_and_leaves_nothing() {
    let agent = Agent::new();
    let a = vm(1, "a");
    let report = agent.client.apply(plan(1, std::slice::from_ref(&a))).unwrap();
    assert_eq!(report.missing.len(), 3);
    let waiting = agent.until_phase(a.vm, Phase::Preparing);
    assert!(waiting.reason.unwrap().contains("image"));
    with_content(&agent);
    // A guest may be ready before the step that launched it has its end noted.
    let report = agent.until("running, with the times of its steps", |report| {
        report.vms.first().is_some_and(|vm| vm.phase == Phase::Running && vm.steps.len() == 5)
    });
    let running = &report.vms[0];
    assert_eq!(running.start, Start(1));
    assert_eq!(agent.vmms(), [running.vmm_pid.unwrap()]);
    let steps: Vec<&str> = running.steps.iter().map(|s| s.step.as_str()).collect();
    assert_eq!(steps, ["blobs", "volume", "folders", "cgroup", "launch"]);
    assert!(running.boot.process_start_us.is_some());

    let mut log = String::new();
    File::from(agent.client.open_log(a.vm).unwrap()).read_to_string(&mut log).unwrap();
    assert_eq!(log, "a runs\n");

    agent.client.apply(plan(2, &[])).unwrap();
    agent.until("gone", |report| report.vms.is_empty());
    assert!(agent.vmms().is_empty());
    assert_eq!(files(&agent), BTreeSet::new());
}

fn jail() {
    let agent = Agent::new();
    with_content(&agent);
    let a = vm(1, "a");
    agent.client.apply(plan(1, std::slice::from_ref(&a))).unwrap();
    agent.until_phase(a.vm, Phase::Running);
    let mut text = String::new();
    File::from(agent.client.open_exec(a.vm).unwrap()).read_to_string(&mut text).unwrap();
    let seen: BTreeMap<&str, &str> = text.lines().map(|line| line.split_once('=').unwrap()).collect();
    assert_eq!(seen["files in /"], "0");
    assert_eq!(seen["a new file"], "read-only filesystem or storage medium");
    assert_eq!(seen["pid"], "1");
    assert_eq!((seen["uid"], seen["gid"], seen["groups"]), ("700000", "700000", "0"));
    assert_eq!((seen["capabilities"], seen["bounding set"]), ("0", "0"));
    assert_eq!((seen["no new privileges"], seen["dumpable"]), ("true", "false"));
    assert_eq!(seen["own session"], "true");
    assert_eq!(seen["interfaces"], "lo");
    assert_eq!(seen["host name"], "vm");
    // Standard streams, ten resources, the configuration; one more is the folder that was being counted.
    assert_eq!(seen["descriptors"], "0,1,2,3,4,5,6,7,8,9,10,11,12,13");
}

fn adopts() {
    let mut agent = Agent::new();
    with_content(&agent);
    let (a, b) = (vm(1, "a"), vm(2, "b"));
    agent.client.apply(plan(1, &[a.clone(), b.clone()])).unwrap();
    let before = [agent.until_phase(a.vm, Phase::Running), agent.until_phase(b.vm, Phase::Running)];
    agent.kill();
    // One ends while nobody looks.
    let pid = nix::unistd::Pid::from_raw(before[1].vmm_pid.unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    agent.start();
    let after = agent.until_phase(a.vm, Phase::Running);
    assert_eq!((after.vmm_pid, after.started_at_ms), (before[0].vmm_pid, before[0].started_at_ms));
    assert!(agent.until_phase(b.vm, Phase::Failed).reason.unwrap().contains("without a record"));
    assert_eq!(agent.vmms(), [before[0].vmm_pid.unwrap()]);

    // The adopted VM stops in good order, and its end is remembered.
    let stopped = blixard_agent_api::VmPlan { run: Run::Stopped { grace_ms: 20_000 }, ..a.clone() };
    agent.client.apply(plan(2, &[stopped, b])).unwrap();
    assert_eq!(agent.until_phase(a.vm, Phase::Stopped).exit, Some(ExitReason::PowerOff));
    agent.restart();
    assert_eq!(agent.until_phase(a.vm, Phase::Stopped).exit, Some(ExitReason::PowerOff));
}

fn twenty() {
    let mut agent = Agent::new();
    with_content(&agent);
    let vms: Vec<_> = (0..20).map(|n| vm(n, &format!("v{n}"))).collect();
    agent.client.apply(plan(1, &vms)).unwrap();
    // In the middle of it: what was begun goes on.
    agent.restart();
    let all = |report: &blixard_agent_api::HostReport| {
        report.vms.len() == 20 && report.vms.iter().all(|v| v.phase == Phase::Running)
    };
    agent.until("twenty running", all);
    let vmms = agent.vmms();
    assert_eq!(vmms.len(), 20);
    let owners: BTreeSet<u32> = vmms.iter().map(|pid| uid(*pid)).collect();
    assert_eq!(owners.len(), 20);
    agent.client.apply(plan(2, &[])).unwrap();
    agent.until("gone", |report| report.vms.is_empty());
    assert_eq!(files(&agent), BTreeSet::new());
}

fn uid(pid: i32) -> u32 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("Uid:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

fn starts() {
    let mut agent = Agent::new();
    with_content(&agent);
    let a = vm(1, "short");
    agent.client.apply(plan(1, std::slice::from_ref(&a))).unwrap();
    let ended = agent.until_phase(a.vm, Phase::Stopped);
    assert_eq!((ended.start, ended.exit), (Start(1), Some(ExitReason::PowerOff)));
    agent.restart();
    agent.client.apply(plan(2, std::slice::from_ref(&a))).unwrap();
    assert_eq!(agent.until_phase(a.vm, Phase::Stopped).ended_at_ms, ended.ended_at_ms);
    let again = blixard_agent_api::VmPlan { start: Start(2), name: "a".into(), ..a };
    agent.client.apply(plan(3, std::slice::from_ref(&again))).unwrap();
    assert_eq!(agent.until_phase(again.vm, Phase::Running).start, Start(2));
    // A start that comes while the one before runs replaces it.
    let third = blixard_agent_api::VmPlan { start: Start(3), ..again };
    agent.client.apply(plan(4, std::slice::from_ref(&third))).unwrap();
    agent.until("third start", |r| {
        of(r, third.vm).is_some_and(|v| v.start == Start(3) && v.phase == Phase::Running)
    });
    assert_eq!(agent.vmms().len(), 1);
}

fn stubborn() {
    let agent = Agent::new();
    with_content(&agent);
    let a = vm(1, "stubborn");
    agent.client.apply(plan(1, std::slice::from_ref(&a))).unwrap();
    agent.until_phase(a.vm, Phase::Running);
    let stopped = blixard_agent_api::VmPlan { run: Run::Stopped { grace_ms: 1 }, ..a.clone() };
    agent.client.apply(plan(2, std::slice::from_ref(&stopped))).unwrap();
    assert_eq!(agent.until_phase(a.vm, Phase::Stopped).exit, Some(ExitReason::Killed));
    assert!(agent.vmms().is_empty());
}

fn silent() {
    let agent = Agent::new();
    with_content(&agent);
    let a = vm(1, "silent");
    agent.client.apply(plan(1, std::slice::from_ref(&a))).unwrap();
    let reason = agent.until_phase(a.vm, Phase::Failed).reason.unwrap();
    assert!(reason.contains("exit code 9") && reason.contains("I have my reasons"), "{reason}");
}

fn volumes() {
    let agent = Agent::new();
    with_content(&agent);
    let (a, b) = (vm(1, "short"), vm(2, "short"));
    agent.client.apply(plan(1, &[a.clone(), b.clone()])).unwrap();
    agent.until_phase(a.vm, Phase::Stopped);
    agent.until_phase(b.vm, Phase::Stopped);
    let path = |vm| agent.path(&format!("state/volumes/{vm}.img"));
    std::fs::remove_file(path(a.vm)).unwrap();
    File::options().write(true).open(path(b.vm)).unwrap().set_len(1 << 20).unwrap();
    let mut agent = agent;
    agent.restart();
    let again = |vm: &blixard_agent_api::VmPlan| blixard_agent_api::VmPlan { start: Start(2), ..vm.clone() };
    agent.client.apply(plan(2, &[again(&a), again(&b)])).unwrap();
    assert!(agent.until_phase(a.vm, Phase::Failed).reason.unwrap().contains("missing"));
    assert!(agent.until_phase(b.vm, Phase::Failed).reason.unwrap().contains("1048576 bytes"));
    assert!(!agent.path(&format!("state/volumes/{}.img", a.vm)).exists());
}

fn no_room() {
    let agent = Agent::new();
    with_content(&agent);
    let place = agent.path("state/volumes");
    let options = Some("size=64k");
    nix::mount::mount(Some("tmpfs"), &place, Some("tmpfs"), nix::mount::MsFlags::empty(), options).unwrap();
    let a = vm(1, "a");
    agent.client.apply(plan(1, std::slice::from_ref(&a))).unwrap();
    let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let full =
            |v: &blixard_agent_api::VmReport| v.reason.as_ref().is_some_and(|r| r.contains("no space left"));
        agent.until("no space", |report| of(report, a.vm).is_some_and(full));
        assert_eq!(
            std::fs::read_dir(&place).unwrap().count(),
            0,
            "what is half made takes the room that is missing"
        );
    }));
    nix::mount::umount(&place).unwrap();
    assert!(told.is_ok());
    // With room it goes on by itself.
    agent.until_phase(a.vm, Phase::Running);
}

fn content() {
    let agent = Agent::new();
    let refused = |blob, file: &File| match agent.client.put_blob(blob, file) {
        Err(AgentError::Refused(problem)) => {
            assert_eq!(problem.kind, ProblemKind::Invalid);
            problem.message
        }
        other => panic!("{other:?}"),
    };
    let path = agent.path("content");
    std::fs::write(&path, b"something").unwrap();
    let open = || File::open(&path).unwrap();
    assert!(refused(blob(b"different"), &open()).contains("is not sha256:"));
    assert!(refused(blob(b"longer than it"), &open()).contains("9 bytes"));
    let writer = File::options().write(true).open(&path).unwrap();
    assert!(refused(blob(b"something"), &writer).contains("regular file"));
    let folder = File::open(agent.folder.path()).unwrap();
    assert!(refused(blob(b"something"), &folder).contains("regular file"));
    let only_a_name = open_with(&path, OFlag::O_PATH, Mode::empty()).unwrap();
    assert!(refused(blob(b"something"), &File::from(only_a_name)).contains("regular file"));
    let (pipe, mut end) = std::io::pipe().unwrap();
    end.write_all(b"something").unwrap();
    assert!(
        refused(blob(b"something"), &File::from(std::os::fd::OwnedFd::from(pipe))).contains("regular file")
    );
    assert_eq!(std::fs::read_dir(agent.path("state/blobs/incoming")).unwrap().count(), 0);

    // Holes and data come back as they were.
    let mut sparse = vec![0; 3 << 20];
    sparse[1 << 20] = 7;
    let stored = agent.put(&sparse);
    let file = agent.path("state/blobs").join(stored.digest.hex());
    assert_eq!(std::fs::read(file).unwrap(), sparse);
    assert_eq!(agent.client.observe(0, 0, 0).unwrap().blobs, [stored]);
}

fn plans() {
    let agent = Agent::new();
    agent.client.apply(plan(5, &[])).unwrap();
    let refused = |plan| match agent.client.apply(plan) {
        Err(AgentError::Refused(problem)) => (problem.kind, problem.message),
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(plan(4, &[])).0, ProblemKind::Stale);
    let wrong = |field: &str, change: fn(&mut blixard_agent_api::VmPlan)| {
        let mut vm = vm(1, "a");
        change(&mut vm);
        let (kind, message) = refused(plan(6, &[vm]));
        assert!(kind == ProblemKind::Invalid && message.contains(field), "{message}");
    };
    wrong("vcpus", |v| v.vcpus = 0);
    wrong("memory_mib", |v| v.memory_mib = 1);
    wrong("volume.size_bytes", |v| v.volume.size_bytes = 5);
    wrong("hostname", |v| v.name = "no name".into());
    wrong("cmdline", |v| v.cmdline = "a\nb".into());
    wrong("image_fs", |v| v.image_fs = "ntfs".into());
    let twice = [vm(1, "a"), vm(1, "a")];
    assert!(refused(plan(6, &twice)).1.contains("planned twice"));

    with_content(&agent);
    let large = blixard_agent_api::VmPlan { memory_mib: 1 << 20, ..vm(2, "large") };
    agent.client.apply(plan(7, std::slice::from_ref(&large))).unwrap();
    assert!(agent.until_phase(large.vm, Phase::Failed).reason.unwrap().contains("the host has"));
    let missing = agent.client.open_log(vm(9, "a").vm).unwrap_err();
    assert!(matches!(missing, AgentError::Refused(p) if p.kind == ProblemKind::NotFound));
}

fn removed_while_dead() {
    let mut agent = Agent::new();
    with_content(&agent);
    let a = vm(1, "a");
    agent.client.apply(plan(1, std::slice::from_ref(&a))).unwrap();
    agent.until_phase(a.vm, Phase::Running);
    agent.kill();
    let path = agent.path("state/plan.json");
    std::fs::write(path, serde_json::to_vec(&plan(2, &[])).unwrap()).unwrap();
    agent.start();
    agent.until("gone", |report| report.vms.is_empty());
    assert!(agent.vmms().is_empty());
    assert_eq!(files(&agent), BTreeSet::new());
}

fn wrong_caller() {
    let mut agent = Agent::new();
    agent.kill();
    agent.options = vec!["--node-uid".into(), "12345".into()];
    std::fs::remove_file(agent.path("agent.log")).unwrap();
    agent.start_without_waiting();
    agent.wait_for_log("serving");
    // Root may open the socket, and is not the node.
    assert!(matches!(agent.client.observe(0, 0, 0), Err(AgentError::Unreachable(_))));
    agent.wait_for_log("not the node's");
}
