//! Three hosts become one cluster: stock kernel, real agents and VMs, systemd units, the command line; one host is cut off, the
//! leader is killed under load, a node is drained, all are upgraded one after the other.
//!
//! Runs on host 0 of the rig (`make test-hosts`, which sets `BLIXARD_THREE_HOSTS`). The tests are one story, told in their order:
//! what one leaves, the next begins with. Programs are in `/opt/blixard`, and a node that knows one feature level more in
//! `/opt/blixard/next`; guest images in `/opt/images`, units in `/opt/units`.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, clippy::print_stdout)]

use std::collections::BTreeSet;
use std::io::Read;
use std::process::Stdio;
use std::sync::Mutex;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use blixard_tests::hosts::{Hosts, Life, address, name, request};
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::json;

static HOSTS: OnceLock<Hosts> = OnceLock::new();
/// A test has failed: what follows would fail for want of what it did not do.
static BROKEN: AtomicBool = AtomicBool::new(false);

/// VMs that may be started elsewhere; one of them on each host at first.
const MOVE: [&str; 3] = ["moves-0", "moves-1", "moves-2"];
/// A VM that waits for its node, which is the last.
const STAYS: &str = "stays";
const LAST: usize = 2;
/// Between two attempts of a client whose request was not acknowledged.
const RETRY: Duration = Duration::from_millis(50);
/// What a workload says when it is asked to end, rather than killed.
const FAREWELL: &str = "asked to end";

fn main() -> std::process::ExitCode {
    let mut arguments = Arguments::from_args();
    if std::env::var_os("BLIXARD_THREE_HOSTS").is_none() && !arguments.list {
        println!("skipped: three hosts: runs in the rig (make test-hosts)");
        return std::process::ExitCode::SUCCESS;
    }
    arguments.test_threads = Some(1);
    let tests: Vec<(&str, fn())> = vec![
        ("three_hosts_become_one_cluster_by_init_token_and_join", form),
        ("vms_run_on_all_of_them_with_what_was_given_to_one", run),
        (
            "a_host_that_is_cut_off_freezes_its_vms_which_run_elsewhere_and_stops_them_when_it_is_back",
            cut_off,
        ),
        ("the_leader_is_killed_under_load_and_no_acknowledged_write_is_lost_nor_a_vm", leader_killed),
        (
            "a_host_without_an_agent_runs_on_and_freezes_its_vms_in_time_when_it_is_cut_off",
            cut_off_without_agent,
        ),
        ("a_node_is_drained_and_its_vms_end_in_good_order_and_run_elsewhere", drain),
        ("nodes_are_upgraded_one_by_one_and_back_until_the_level_is_raised_while_vms_run_on", upgrade),
    ];
    let trials = tests.into_iter().map(|(name, test)| {
        Trial::test(name, move || {
            if BROKEN.load(Ordering::Relaxed) {
                return Err(Failed::from("not tried, since a test before it failed"));
            }
            std::panic::catch_unwind(test).map_err(|e| {
                BROKEN.store(true, Ordering::Relaxed);
                let text = e.downcast_ref::<String>().cloned();
                Failed::from(
                    text.or_else(|| e.downcast_ref::<&str>().map(|s| (*s).into())).unwrap_or_default(),
                )
            })
        })
    });
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    if let Some(hosts) = HOSTS.get().filter(|_| conclusion.has_failed()) {
        for host in 0..3 {
            println!("-- {}: nodes, VMs, end of the log:", name(host));
            println!(
                "{}{}",
                hosts.blixard(host, &["node", "ls"]).out,
                hosts.blixard(host, &["ps", "-a"]).out
            );
            hosts.log(host, 120).lines().for_each(|line| println!("  | {line}"));
        }
    }
    conclusion.exit_code()
}

fn hosts() -> &'static Hosts {
    HOSTS.get().unwrap()
}

fn form() {
    let hosts = HOSTS.get_or_init(|| Hosts::prepare("/opt/blixard", "/opt/units"));
    hosts.say("programs are on all hosts");
    hosts.on_all(|host| {
        hosts.install(host, "/root/now").good();
        hosts.until("the node serves", || hosts.blixard(host, &["ps"]).code == 0);
    });
    hosts.say("installed");
    hosts.blixard(0, &["cluster", "init", "--address", &address(0)]).good();
    for host in 1..3 {
        let token = hosts.blixard(0, &["cluster", "token", "create"]).good();
        hosts.blixard(host, &["join", token.trim(), "--address", &address(host)]).good();
        hosts.say(&format!("{} has joined", name(host)));
    }
    for host in 0..3 {
        hosts.until("all vote", || {
            hosts.get(host, "/v1/cluster")["voters"].as_array().is_some_and(|voters| voters.len() == 3)
        });
        hosts.until("its agent enforces leases", || hosts.node(0, host)["leased"] == true);
    }
    hosts.say("all vote, and all agents enforce leases");
    let again = hosts.blixard(0, &["cluster", "init", "--address", &address(0)]);
    assert_eq!(again.code, 4, "{again:?}");
}

fn run() {
    let hosts = hosts();
    let release = hosts.sh(0, "ls /lib/modules | grep cloud").good().trim().to_owned();
    let (kernel, modules) = (format!("/boot/vmlinuz-{release}"), format!("/lib/modules/{release}"));
    let import = ["kernel", "import", "--name", "default", "--kernel", &kernel, "--modules", &modules];
    hosts.blixard(0, &import).good();
    hosts.blixard(0, &["image", "import", "/opt/images/busybox.tar", "--name", "busybox"]).good();
    hosts.say("kernel and image are imported on one host");
    // Each agent gets them by itself. Afterwards, since that takes what processors there are.
    let count = "ls /var/lib/blixard/agent/blobs | grep -vc incoming";
    for host in 0..3 {
        hosts.until("it has them", || hosts.sh(host, count).out.trim() == "3");
    }
    hosts.say("and arrived on all");
    let script = format!("trap 'echo {FAREWELL}; exit 0' TERM; echo begun; while :; do sleep 1; done");
    let begin = |vm: &str, place: &[&str]| {
        let mut args = vec!["run", "-d", "--memory", "96M", "--disk", "16M", "--name", vm];
        args.extend(place);
        args.extend(["busybox", "sh", "-c", &script]);
        hosts.blixard(0, &args).good();
    };
    for vm in MOVE {
        begin(vm, &["--anti-affinity", "apart:node:soft"]);
    }
    begin(STAYS, &["--constraint", &format!("node={}", name(LAST)), "--on-node-loss", "wait"]);
    for vm in [&MOVE[..], &[STAYS]].concat() {
        let answer = hosts.blixard(0, &["wait", "--for", "ready", "--timeout", "300s", vm]);
        assert_eq!(answer.code, 0, "{answer:?}\n{}", hosts.vm(0, vm));
    }
    hosts.say("four VMs run");
    let places: BTreeSet<_> = MOVE.iter().map(|vm| hosts.place(0, vm).unwrap()).collect();
    assert_eq!(places.len(), 3, "one on each host");
    assert_eq!(hosts.place(0, STAYS), Some(LAST));
    for vm in MOVE {
        let host = hosts.place(0, vm).unwrap();
        for asked in [host, (host + 1) % 3] {
            assert_eq!(hosts.blixard(asked, &["exec", vm, "uname", "-r"]).good().trim(), release);
            let shown = hosts.blixard(asked, &["logs", vm]).good();
            assert!(shown.contains("begun"), "host {asked} shows:\n{shown}");
        }
        assert_eq!(hosts.vm(LAST, vm)["phase"], "running", "every node shows every VM");
    }
}

/// The VM that may be moved and is on this host.
fn mover_on(host: usize) -> &'static str {
    MOVE.into_iter().find(|vm| hosts().place(0, vm) == Some(host)).unwrap()
}

/// All VMs that run, with where and as what, so that it can be seen whether they ran on.
fn lives() -> Vec<(&'static str, usize, Life)> {
    let place = |vm| hosts().place(0, vm).unwrap();
    let vms = [&MOVE[..], &[STAYS]].concat();
    vms.into_iter().map(|vm| (vm, place(vm), hosts().life(place(vm), vm))).collect()
}

/// Milliseconds of a host's clock.
const NOW_MS: &str = "date +%s%3N";

/// Cuts a host off, waits until this VM of it runs elsewhere, and sees that it was frozen before that was planned. Answers where.
fn cut_until_elsewhere(host: usize, moved: &str) -> usize {
    let hosts = hosts();
    let now_ms = |host: usize| hosts.sh(host, NOW_MS).good().trim().parse::<i64>().unwrap();
    // How much the clock of the host that is cut off is ahead of ours; less than it seems, since the answer took a while.
    let ahead = now_ms(host) - now_ms(0);
    let freeze = hosts.cgroup(moved).join("cgroup.freeze").display().to_string();
    let when_frozen = format!("until grep -q 1 {freeze}; do sleep 0.05; done; {NOW_MS}");
    let watcher = hosts.script(host, &when_frozen).stdout(Stdio::piped()).spawn().unwrap();
    hosts.cut(host);
    let (cut, cut_ms) = (Instant::now(), now_ms(0));
    hosts.say(&format!("{} is cut off", name(host)));
    hosts.until("it is placed elsewhere", || hosts.place(0, moved).is_some_and(|there| there != host));
    let (placed, placed_ms) = (cut.elapsed(), now_ms(0));
    let there = hosts.place(0, moved).unwrap();
    hosts.until("it runs there", || hosts.vm(0, moved)["phase"] == "running");
    let ran = cut.elapsed();
    let output = watcher.wait_with_output().unwrap();
    let frozen_ms = String::from_utf8(output.stdout).unwrap().trim().parse::<i64>().unwrap() - ahead;
    hosts.say(&format!(
        "frozen after {} ms, elsewhere planned after {} ms, running after {} ms",
        frozen_ms - cut_ms,
        placed.as_millis(),
        ran.as_millis()
    ));
    assert!(frozen_ms < placed_ms, "frozen there before it is planned elsewhere");
    there
}

fn cut_off() {
    let hosts = hosts();
    let (moved, stayed) = (mover_on(LAST), hosts.life(LAST, STAYS));
    let cgroup = hosts.cgroup(moved);
    let file = |vm: &str, name: &str| hosts.cgroup(vm).join(name).display().to_string();
    let there = cut_until_elsewhere(LAST, moved);

    // Frozen is what uses no processor: not one microsecond within a second.
    let used = |vm: &str| {
        let stat = file(vm, "cpu.stat");
        hosts.sh(LAST, &format!("head -n 1 {stat}; sleep 1; head -n 1 {stat}")).good()
    };
    let (of_moved, of_stays) = (used(moved), used(STAYS));
    let same = |text: &str| text.lines().next() == text.lines().nth(1);
    assert!(same(&of_moved), "the VM that may run elsewhere stands still: {of_moved}");
    assert!(!same(&of_stays), "the one that waits for its node runs: {of_stays}");
    let log = hosts.log(LAST, 400);
    assert!(log.contains("lease: VM frozen"), "its agent knows: {log}");
    assert_eq!(hosts.life(LAST, STAYS), stayed, "it answers exec on the host that is cut off");
    assert_eq!(hosts.vm(0, moved)["epoch"], 2);
    let alone = request(&hosts.socket(LAST), "GET", "/v1/cluster?linearizable=true", "").unwrap();
    assert_eq!(alone.0, 503, "a node that is alone confirms nothing");
    let new = hosts.life(there, moved);

    hosts.mend(LAST);
    let mended = Instant::now();
    hosts.until("the frozen VM is gone there", || {
        hosts.sh(LAST, &format!("[ ! -e {} ]", cgroup.display())).code == 0
    });
    let gone = mended.elapsed();
    hosts.until("it is up", || hosts.node(0, LAST)["status"] == "up");
    hosts.say(&format!("back: frozen VM stopped after {} ms", gone.as_millis()));
    assert_eq!(hosts.life(there, moved), new, "what runs elsewhere runs on");
    assert_eq!(hosts.vm(0, moved)["epoch"], 2);
    assert_eq!(hosts.life(LAST, STAYS), stayed, "what waits for its node ran all the time");
    assert_eq!(hosts.vm(0, STAYS)["epoch"], 1);
    hosts.until("it has leases again", || hosts.node(0, LAST)["leased"] == true);
}

fn cut_off_without_agent() {
    let hosts = hosts();
    let from = 1;
    let moved = mover_on(from);
    let stat = hosts.cgroup(moved).join("cpu.stat").display().to_string();
    let stands_still = || {
        let used = hosts.sh(from, &format!("head -n 1 {stat}; sleep 1; head -n 1 {stat}")).good();
        used.lines().next() == used.lines().nth(1)
    };
    let old = hosts.cgroup(moved);
    hosts.sh(from, "systemctl stop blixard-agent.service").good();
    // Of what the agent was told last, nothing is left.
    let over = "until=$(sed 's/.*\"until_ms\":\\([0-9]*\\).*/\\1/' /run/blixard/lease.json)
        [ \"$(awk '{printf \"%d\", $1 * 1000}' /proc/uptime)\" -gt $((until + 1000)) ]";
    hosts.until("the agent's lease is over", || hosts.sh(from, over).code == 0);
    assert!(!stands_still(), "while the agent is dead its VMs run on: the node has a lease");
    hosts.say("a host without an agent runs on, longer than what its agent was told");

    let there = cut_until_elsewhere(from, moved);
    assert!(stands_still(), "its guard has frozen it");
    let new = hosts.life(there, moved);
    hosts.mend(from);
    hosts.until("it is up", || hosts.node(there, from)["status"] == "up");
    assert!(stands_still(), "nothing thaws it while there is no agent");
    hosts.sh(from, "systemctl start blixard-agent.service").good();
    hosts.until("the frozen VM is gone there", || {
        hosts.sh(from, &format!("[ ! -e {} ]", old.display())).code == 0
    });
    hosts.until("it has leases again", || hosts.node(there, from)["leased"] == true);
    assert_eq!(hosts.life(there, moved), new, "what runs elsewhere runs on");
    hosts.say("its agent is back, and the frozen VM is gone");
}

/// Writes tokens for the API, each with a name of its own, until `stop`; notes what was acknowledged, and when it was begun.
fn write(hosts: &Hosts, writer: usize, stop: &AtomicBool, acknowledged: &Mutex<Vec<(String, Instant)>>) {
    let mut at = writer;
    for number in 0.. {
        let name = format!("w-{writer}-{number}");
        let body = json!({"name": name}).to_string();
        loop {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            let begun = Instant::now();
            // The nodes that are not killed: what was not acknowledged is asked of the other one.
            let socket = hosts.socket(if at.is_multiple_of(2) { 0 } else { LAST });
            if matches!(request(&socket, "POST", "/v1/tokens", &body), Ok((201, _))) {
                acknowledged.lock().unwrap().push((name, begun));
                break;
            }
            at += 1;
            // As a client does, rather than taking what processors there are from the node that has to come back.
            std::thread::sleep(RETRY);
        }
    }
}

fn leader_killed() {
    let hosts = hosts();
    let leader = hosts.leader(0).unwrap();
    if leader != 1 {
        hosts.blixard(leader, &["cluster", "transfer-leader", &name(1)]).good();
        hosts.until("another leads", || hosts.leader(0) == Some(1) && hosts.leader(LAST) == Some(1));
    }
    let before = lives();
    let term = hosts.get(0, "/v1/cluster")["term"].as_u64();
    let (stop, acknowledged) = (AtomicBool::new(false), Mutex::new(Vec::new()));
    let since = |moment: Instant| {
        acknowledged.lock().unwrap().iter().filter(|(_, begun): &&(String, Instant)| *begun > moment).count()
    };
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let (stop, acknowledged) = (&stop, &acknowledged);
            scope.spawn(move || write(hosts, writer, stop, acknowledged));
        }
        hosts.until("writes go through", || since(begin) > 40);
        let count = since(begin);
        hosts.sh(1, "systemctl kill -s KILL blixard-node.service").good();
        let killed = Instant::now();
        hosts.until("writes go through without the leader", || since(killed) > 0);
        let again = killed.elapsed();
        hosts.until("and go on", || since(killed) > 40);
        stop.store(true, Ordering::Relaxed);
        hosts
            .say(&format!("leader killed after {count} writes; the next one after {} ms", again.as_millis()));
    });
    hosts.until("systemd has started it again", || {
        request(&hosts.socket(1), "GET", "/v1/cluster?linearizable=true", "")
            .is_ok_and(|(status, _)| status == 200)
    });
    assert!(hosts.get(0, "/v1/cluster")["term"].as_u64() > term, "there was an election");
    let acknowledged = acknowledged.into_inner().unwrap();
    for host in 0..3 {
        let (status, _) = request(&hosts.socket(host), "GET", "/v1/cluster?linearizable=true", "").unwrap();
        assert_eq!(status, 200);
        let tokens = hosts.get(host, "/v1/tokens");
        let there: BTreeSet<&str> =
            tokens["items"].as_array().unwrap().iter().filter_map(|token| token["name"].as_str()).collect();
        for (name, _) in &acknowledged {
            assert!(there.contains(name.as_str()), "{name} was acknowledged and is not on {host}");
        }
    }
    hosts.say(&format!("all {} acknowledged writes are on all nodes", acknowledged.len()));
    assert_eq!(lives(), before, "VMs ran on");
}

fn drain() {
    let hosts = hosts();
    let from =
        [1, 0].into_iter().find(|host| MOVE.iter().any(|vm| hosts.place(0, vm) == Some(*host))).unwrap();
    let drained = mover_on(from);
    let epoch = hosts.vm(0, drained)["epoch"].as_u64().unwrap();
    let others: Vec<_> = lives().into_iter().filter(|(_, host, _)| *host != from).collect();
    let mut logs = hosts.command(from, &["logs", "-f", drained]);
    let mut logs = logs.stdout(Stdio::piped()).spawn().unwrap();
    // What has begun to be shown is shown to its end.
    logs.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    hosts.blixard(0, &["node", "drain", &name(from)]).good();
    let begin = Instant::now();
    hosts.until("the node is empty", || hosts.node(0, from)["vms"] == 0);
    hosts.say(&format!("drained after {} ms", begin.elapsed().as_millis()));
    // It may wait for the next start.
    logs.kill().unwrap();
    let console = String::from_utf8_lossy(&logs.wait_with_output().unwrap().stdout).into_owned();
    assert!(console.contains(FAREWELL), "it ended in good order:\n{console}");
    hosts.until("it runs elsewhere", || hosts.vm(0, drained)["phase"] == "running");
    let (view, there) = (hosts.vm(0, drained), hosts.place(0, drained).unwrap());
    assert_eq!(view["epoch"].as_u64(), Some(epoch + 1), "{view}");
    assert_ne!(there, from);
    hosts.blixard(there, &["exec", drained, "true"]).good();
    hosts.say("it runs elsewhere");
    for (vm, host, life) in others {
        assert_eq!(hosts.life(host, vm), life, "others run on");
    }
    hosts.blixard(0, &["node", "uncordon", &name(from)]).good();
    assert_eq!(hosts.node(0, from)["draining"], false);
}

/// What the cluster's level is, and what the node of this host knows, as that node says.
fn levels(host: usize) -> (u64, u64) {
    let status = hosts().get(host, "/v1/cluster");
    let number = |key: &str| status[key].as_u64().unwrap_or_default();
    (number("feature_level"), number("feature_level_known"))
}

/// Installs a build on one host, and sees that it is a good member and no VM has noticed.
fn replace(host: usize, programs: &str, level: (u64, u64), vms: &[(&'static str, usize, Life)]) {
    let (hosts, other) = (hosts(), (host + 1) % 3);
    hosts.install(host, programs).good();
    hosts.until("the others know what it is", || {
        hosts.node(other, host)["feature_level"] == level.1 && hosts.node(other, host)["status"] == "up"
    });
    let confirmed = || request(&hosts.socket(host), "GET", "/v1/cluster?linearizable=true", "");
    hosts.until("it takes part", || confirmed().is_ok_and(|(status, _)| status == 200));
    assert_eq!(levels(host), level);
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    for asked in 0..3 {
        let token = format!("mixed-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        hosts.blixard(asked, &["token", "create", &token]).good();
    }
    for (vm, _, life) in vms.iter().filter(|(_, place, _)| *place == host) {
        assert_eq!(hosts.life(host, vm), *life, "{vm} runs on");
    }
    hosts.say(&format!("{} runs the build of {programs}", name(host)));
}

fn upgrade() {
    let hosts = hosts();
    let vms = lives();
    let (level, _) = levels(0);
    let (old, new) = ((level, level), (level, level + 1));
    replace(1, "/root/next", new, &vms);
    // The new version leads the old one.
    let leader = hosts.leader(0).unwrap();
    if leader != 1 {
        hosts.blixard(leader, &["cluster", "transfer-leader", &name(1)]).good();
        hosts.until("the new version leads", || hosts.leader(0) == Some(1));
    }
    replace(2, "/root/next", new, &vms);
    let early = hosts.blixard(1, &["cluster", "raise-level"]);
    assert_eq!(early.code, 4, "{early:?}");
    assert!(
        early.err.contains("rig0") && early.err.contains(&format!("up to feature level {level}")),
        "{early:?}"
    );
    // There is a way back for as long as the level is not raised.
    replace(1, "/root/now", old, &vms);
    replace(1, "/root/next", new, &vms);
    replace(0, "/root/next", new, &vms);
    assert_eq!(levels(0), new);
    hosts.blixard(0, &["cluster", "raise-level"]).good();
    for host in 0..3 {
        hosts.until("the level is raised", || levels(host) == (level + 1, level + 1));
    }
    assert_eq!(lives(), vms, "VMs run on");
    hosts.say("the level is raised");

    // None of them can be of the old version any more, and none can join.
    let why = format!("the cluster has feature level {}, ", level + 1);
    let token = hosts.blixard(0, &["cluster", "token", "create"]).good();
    let join = format!(
        "mkdir -m 777 /var/tmp/late && setpriv --reuid blixard --clear-groups --regid blixard \
        /root/late --state /var/tmp/late --socket /var/tmp/late/sock --name late --address 10.77.0.2:7441 --join {}",
        token.trim()
    );
    hosts.sh(1, "install -m 755 /root/now/blixard-node /root/late && chmod 711 /root").good();
    let late = hosts.sh(1, &join);
    assert_ne!(late.code, 0, "{late:?}");
    assert!(late.err.contains(&why), "{late:?}");
    assert_ne!(hosts.install(LAST, "/root/now").code, 0, "the unit does not start");
    let log = hosts.log(LAST, 40);
    assert!(log.contains(&why), "{log}");
    hosts.say("the old version is refused");
    let stays = vms.iter().find(|(vm, ..)| *vm == STAYS).unwrap();
    hosts.install(LAST, "/root/next").good();
    hosts.until("the new one takes part again", || {
        levels(LAST) == (level + 1, level + 1) && hosts.node(0, LAST)["status"] == "up"
    });
    hosts.until("exec is answered", || hosts.blixard(LAST, &["exec", STAYS, "true"]).code == 0);
    assert_eq!(hosts.life(LAST, STAYS), stays.2, "it ran on without a node");
    hosts.say("and the new one is back");
}
