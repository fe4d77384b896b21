//! What a node costs with as many VMs as one node takes, and whether it ages.
//!
//! * 10,000 VMs that run, on an agent without a host: memory of the node process, and how long it takes from its start until it
//!   answers, after an end in good order and after SIGKILL.
//! * A million VMs made and forgotten: time of a command and sizes of files, by tenth. The measuring program is an example of
//!   `blixard-node` (benchmarks link no code of the project).

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::raft::RaftError;
use crate::raft::cluster::{Http, PURGE_DELAY, VMS, content, free, start_agent, ulid, until};
use crate::table::{machine, say, write_json};

/// Clients that make the VMs.
const CLIENTS: u64 = 16;
/// Longest wait for all VMs to run.
const RUN_MAX: Duration = Duration::from_secs(300);
/// How long the process is left alone before its memory is read: caches are flushed, reports have come.
const SETTLE: Duration = Duration::from_secs(5);

/// What to measure.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// VMs that run; 0 leaves this part out.
    #[arg(long, default_value_t = 10_000)]
    vms: u64,
    /// How often the node is started again in each way.
    #[arg(long, default_value_t = 5)]
    starts: u32,
    /// VMs that are made and forgotten; 0 leaves this part out.
    #[arg(long, default_value_t = 1_000_000)]
    cycles: u64,
    /// Clients of that.
    #[arg(long, default_value_t = 64)]
    clients: u64,
    /// Folder for state, on the disk to measure.
    #[arg(long, default_value = "target/bench-node")]
    work: PathBuf,
    /// Folder with blixard-node and its examples `agent` and `cycles` below it; otherwise that of this program.
    #[arg(long)]
    programs: Option<PathBuf>,
}

struct Node {
    program: PathBuf,
    arguments: Vec<String>,
    folder: PathBuf,
    api: SocketAddr,
    process: Child,
    agent: Child,
}

impl Drop for Node {
    fn drop(&mut self) {
        for process in [&mut self.process, &mut self.agent] {
            process.kill().ok();
            process.wait().ok();
        }
    }
}

fn system(what: &str) -> impl FnOnce(std::io::Error) -> RaftError + use<> {
    RaftError::system(what.to_owned())
}

impl Node {
    fn start(work: &Path, programs: &Path) -> Result<Self, RaftError> {
        std::fs::remove_dir_all(work).ok();
        std::fs::create_dir_all(work).map_err(system("make a folder"))?;
        let socket = work.join("agent.sock");
        let agent = start_agent(&programs.join("blixard-node"), &socket)?;
        let (api, program) = (free()?, programs.join("blixard-node"));
        let text = |path: &Path| path.display().to_string();
        let arguments: Vec<String> = [
            ("--state", text(&work.join("state"))),
            ("--agent", text(&socket)),
            ("--socket", text(&work.join("api.sock"))),
            ("--init", text(&program)),
            ("--name", "n1".to_owned()),
            ("--listen", api.to_string()),
        ]
        .into_iter()
        .flat_map(|(option, value)| [option.to_owned(), value])
        .collect();
        let process = spawn(&program, &arguments, work)?;
        let node = Self { program, arguments, folder: work.to_owned(), api, process, agent };
        node.until_answering()?;
        Ok(node)
    }

    fn http(&self) -> Result<Http, RaftError> {
        Http::connect(self.api, Duration::from_secs(30))
    }

    fn until_answering(&self) -> Result<(), RaftError> {
        until("the node answers", || {
            let (status, _) = self.http().ok()?.ask("GET", &format!("{VMS}?limit=1"), &[]).ok()?;
            (status == 200).then_some(())
        })
    }

    /// VMs that run.
    fn running(&self) -> Result<u64, RaftError> {
        let (_, text) = self.http()?.ask("GET", "/metrics", &[])?;
        let text = String::from_utf8_lossy(&text).into_owned();
        let line = text.lines().find_map(|line| line.strip_prefix("blixard_vms{phase=\"running\"} "));
        Ok(line.and_then(|number| number.parse().ok()).unwrap_or(0))
    }

    /// Resident memory in KiB: now, and the most there was.
    fn memory(&self) -> (u64, u64) {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap_or_default();
        let of = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.split_whitespace().next().and_then(|kib| kib.parse().ok()).unwrap_or(0)
        };
        (of("VmRSS:"), of("VmHWM:"))
    }

    fn fill(&self, vms: u64) -> Result<(), RaftError> {
        let mut http = self.http()?;
        let (image, kernel) = content();
        // A node without limits of its own: what is measured is not the scheduler.
        let policy = json!({"cpu_percent": 100_000, "memory_percent": 1000, "disk_percent": 100_000});
        for (method, path, body) in [
            ("POST", "/v1/images?name=img", image),
            ("POST", "/v1/kernels?name=default", kernel),
            ("PUT", "/v1/nodes/n1/policy", policy.to_string().into_bytes()),
        ] {
            let (status, answer) = http.ask(method, path, &body)?;
            if !matches!(status, 200 | 201) {
                return Err(RaftError::Wrong(format!(
                    "{path}: {status} {}",
                    String::from_utf8_lossy(&answer)
                )));
            }
        }
        std::thread::scope(|scope| {
            let client = |part: u64| {
                let mut http = self.http()?;
                for number in (0..vms).filter(|number| number % CLIENTS == part) {
                    let spec = json!({
                        "image": "img", "memory_mib": 64, "disk_mib": 64, "env": {"NUMBER": number.to_string()},
                    });
                    let id = ulid(u128::from(number) + 1);
                    let body = json!({"id": id, "name": format!("vm-{number}"), "spec": spec}).to_string();
                    let (status, answer) = http.ask("POST", VMS, body.as_bytes())?;
                    if status != 201 {
                        let text = String::from_utf8_lossy(&answer).into_owned();
                        return Err(RaftError::Wrong(format!("VM {number}: {status} {text}")));
                    }
                }
                Ok(())
            };
            let clients: Vec<_> = (0..CLIENTS).map(|part| scope.spawn(move || client(part))).collect();
            let failed = |_| RaftError::Wrong("a client panicked".into());
            clients.into_iter().try_for_each(|client| client.join().map_err(failed)?)
        })?;
        let begin = Instant::now();
        while self.running()? < vms {
            if begin.elapsed() > RUN_MAX {
                return Err(RaftError::Late(format!("{} of {vms} VMs run", self.running()?)));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Ends the node and starts it again; answers the milliseconds until it answers.
    fn restart(&mut self, in_good_order: bool) -> Result<f64, RaftError> {
        if in_good_order {
            let pid = i32::try_from(self.process.id()).unwrap_or(i32::MAX);
            let sent =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM);
            sent.map_err(|errno| system("end the node")(errno.into()))?;
        } else {
            self.process.kill().map_err(system("kill the node"))?;
        }
        self.process.wait().map_err(system("wait for the node"))?;
        let begin = Instant::now();
        self.process = spawn(&self.program, &self.arguments, &self.folder)?;
        self.until_answering()?;
        Ok(begin.elapsed().as_secs_f64() * 1000.0)
    }
}

fn spawn(program: &Path, arguments: &[String], folder: &Path) -> Result<Child, RaftError> {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(folder.join("log"));
    let log = log.map_err(system("open a log"))?;
    let mut command = Command::new(program);
    command.env(PURGE_DELAY.0, PURGE_DELAY.1);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    command.spawn().map_err(RaftError::system(format!("start {}", program.display())))
}

fn mib(kib: u64) -> String {
    format!("{}.{} MiB", kib / 1024, kib % 1024 * 10 / 1024)
}

fn many(options: &Options, programs: &Path) -> Result<Value, RaftError> {
    let mut node = Node::start(&options.work, programs)?;
    let (empty, _) = node.memory();
    let begin = Instant::now();
    node.fill(options.vms)?;
    let filled_s = begin.elapsed().as_secs_f64();
    std::thread::sleep(SETTLE);
    let (full, full_most) = node.memory();
    say(&format!("{} VMs: made and running after {filled_s:.1} s", options.vms));
    say("                                 now        most");
    say(&format!("memory, no VM            {:>11}", mib(empty)));
    say(&format!("memory, all running      {:>11} {:>11}", mib(full), mib(full_most)));
    let (mut good, mut killed) = (Vec::new(), Vec::new());
    let mut after = (0, 0);
    for _ in 0..options.starts {
        good.push(node.restart(true)?);
        killed.push(node.restart(false)?);
        std::thread::sleep(SETTLE);
        let (now, most) = node.memory();
        after = (after.0.max(now), after.1.max(most));
        let running = node.running()?;
        if running != options.vms {
            return Err(RaftError::Wrong(format!("{running} VMs run after a start")));
        }
    }
    say(&format!("memory, after a start    {:>11} {:>11}", mib(after.0), mib(after.1)));
    for (what, times) in [("in good order", &mut good), ("SIGKILL", &mut killed)] {
        times.sort_by(f64::total_cmp);
        let at = |n: usize| times.get(n).copied().unwrap_or(f64::NAN);
        say(&format!(
            "start after {what:13} median {:6.0} ms, min {:6.0}, max {:6.0}",
            at(times.len() / 2),
            at(0),
            at(times.len().saturating_sub(1))
        ));
    }
    Ok(json!({
        "vms": options.vms, "fill_seconds": filled_s, "empty_kib": empty, "full_kib": full, "full_most_kib": full_most,
        "after_start_kib": after.0, "after_start_most_kib": after.1, "start_ms": good, "start_after_kill_ms": killed,
    }))
}

fn ages(options: &Options, programs: &Path) -> Result<Value, RaftError> {
    let folder = options.work.join("cycles");
    std::fs::remove_dir_all(&folder).ok();
    let mut process = Command::new(programs.join("examples/cycles"))
        .arg(&folder)
        .args([options.cycles.to_string(), options.clients.to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .map_err(system("start the cycles (cargo build --release -p blixard-node --examples)"))?;
    say(&format!(
        "\n{} VMs made and forgotten, three commands each, {} clients",
        options.cycles, options.clients
    ));
    say("   cycles  commands/s   p50 ms   p99 ms  p99.9 ms   max ms   log MiB  state MiB  memory MiB");
    let mut rows = Vec::new();
    let lines = process.stdout.take().map(BufReader::new).into_iter().flat_map(BufRead::lines);
    let mut before = 0.0;
    for line in lines.map_while(Result::ok) {
        let row: Value = serde_json::from_str(&line).map_err(|error| RaftError::Wrong(error.to_string()))?;
        let of = |name: &str| row.get(name).and_then(Value::as_f64).unwrap_or(f64::NAN);
        say(&format!(
            "{:9.0} {:11.0} {:8.2} {:8.2} {:9.2} {:8.2} {:9.1} {:10.1} {:11.1}",
            of("cycles"),
            (of("cycles") - before) * 3.0 / of("seconds"),
            of("p50_us") / 1e3,
            of("p99_us") / 1e3,
            of("p999_us") / 1e3,
            of("max_us") / 1e3,
            of("log_bytes") / 1_048_576.0,
            of("state_bytes") / 1_048_576.0,
            of("memory_kib") / 1024.0,
        ));
        before = of("cycles");
        rows.push(row);
    }
    let status = process.wait().map_err(system("wait for the cycles"))?;
    if status.success() { Ok(rows.into()) } else { Err(RaftError::Wrong("the cycles failed".into())) }
}

/// Measures, prints and stores.
///
/// # Errors
/// See [`RaftError`].
pub fn run(options: &Options, out: &Path) -> Result<(), RaftError> {
    let beside = std::env::current_exe().ok().and_then(|path| path.parent().map(Path::to_owned));
    let programs = options.programs.clone().or(beside).unwrap_or_default();
    let many = if options.vms > 0 { many(options, &programs)? } else { Value::Null };
    let ages = if options.cycles > 0 { ages(options, &programs)? } else { Value::Null };
    std::fs::remove_dir_all(&options.work).ok();
    let record =
        json!({"title": "node: one with many VMs", "machine": machine(), "many": many, "cycles": ages});
    Ok(write_json(out, "node", &record)?)
}
