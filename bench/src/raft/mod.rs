//! Three voters on this machine under load: durable writes and linearizable reads per second, and how long a dead leader is
//! missed; beside another system on the same disk, one after the other, several times.
//!
//! * [`cluster`]: three nodes of ours
//! * [`etcd`]: three members of etcd
//! * [`load`]: clients that ask again and again, each over a connection of its own
//! * [`failover`]: the leader is killed, a member is frozen

pub mod cluster;
mod etcd;
mod failover;
mod load;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

use self::cluster::Blixard;
use self::etcd::Etcd;
use self::load::Run;
use crate::table::{TableError, machine, say, write_json};

/// What to measure.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Another system to measure beside ours.
    #[arg(long, value_enum)]
    peer: Option<Peer>,
    /// Numbers of clients.
    #[arg(long, value_delimiter = ',', default_value = "1,16,64,256")]
    clients: Vec<usize>,
    /// Seconds of each run.
    #[arg(long, default_value = "4")]
    seconds: u64,
    /// How often everything is measured; the tables show medians.
    #[arg(long, default_value = "3")]
    repeats: usize,
    /// How often the leader is killed.
    #[arg(long, default_value = "20")]
    kills: usize,
    /// Folder for the members' state, on the disk to measure.
    #[arg(long, default_value = "target/bench-raft")]
    work: PathBuf,
    /// Folder with blixard-node; otherwise that of this program.
    #[arg(long)]
    programs: Option<PathBuf>,
}

/// A system to measure beside ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Peer {
    /// etcd, as the program `etcd` in PATH.
    Etcd,
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum RaftError {
    /// A program cannot be started, or a file not be used.
    #[error("cannot {what}")]
    System {
        /// What.
        what: String,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// Something was not so in time.
    #[error("not in time: {0}")]
    Late(String),
    /// An answer was not what it should be.
    #[error("{0}")]
    Wrong(String),
    /// See [`TableError`].
    #[error("the result cannot be stored")]
    Table(#[from] TableError),
}

impl RaftError {
    pub fn system(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::System { what, source }
    }
}

/// Three members of some system.
pub trait System: Sized {
    /// Its name.
    const NAME: &'static str;
    /// Starts three members with fresh state in this folder, and waits until they work.
    ///
    /// # Errors
    /// See [`RaftError`], as for all calls.
    fn start(work: &Path, programs: &Path) -> Result<Self, RaftError>;
    /// Makes what client `number` of the load needs.
    ///
    /// # Errors
    /// See [`RaftError`].
    fn client(&self, number: usize) -> Result<impl load::Client, RaftError>;
}

/// One measured row.
#[derive(Debug, Clone)]
struct Row {
    system: &'static str,
    what: &'static str,
    clients: usize,
    runs: Vec<Run>,
}

fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Row {
    fn median(&self, of: impl Fn(&Run) -> f64) -> f64 {
        middle(self.runs.iter().map(of).collect())
    }
}

fn measure<S: System>(options: &Options, programs: &Path, rows: &mut Vec<Row>) -> Result<(), RaftError> {
    let system = S::start(&options.work, programs)?;
    let time = Duration::from_secs(options.seconds);
    for (what, write) in [("write", true), ("read", false)] {
        for clients in &options.clients {
            let members: Result<Vec<_>, RaftError> = (0..*clients).map(|n| system.client(n)).collect();
            let run = load::run(members?, write, time)?;
            say(&format!(
                "  {:8} {what:5} {clients:4} clients: {:8.0}/s, p50 {:.2} ms, p99 {:.2} ms",
                S::NAME,
                run.rate,
                run.p50_ms,
                run.p99_ms
            ));
            match rows.iter_mut().find(|r| (r.system, r.what, r.clients) == (S::NAME, what, *clients)) {
                Some(row) => row.runs.push(run),
                None => rows.push(Row { system: S::NAME, what, clients: *clients, runs: vec![run] }),
            }
        }
    }
    Ok(())
}

/// Measures, prints and stores.
///
/// # Errors
/// See [`RaftError`].
pub fn run(options: &Options, out: &Path) -> Result<(), RaftError> {
    let beside = std::env::current_exe().ok().and_then(|path| path.parent().map(Path::to_owned));
    let programs = options.programs.clone().or(beside).unwrap_or_default();
    let mut rows = Vec::new();
    let load_before = load_average();
    for repeat in 1..=options.repeats {
        say(&format!("round {repeat} of {}", options.repeats));
        measure::<Blixard>(options, &programs, &mut rows)?;
        if options.peer == Some(Peer::Etcd) {
            measure::<Etcd>(options, &programs, &mut rows)?;
        }
    }
    say("\nthree voters, this machine, medians");
    say("what   clients  system       per s      min      max   p50 ms   p99 ms   ratio");
    let mut json_rows = Vec::new();
    for row in &rows {
        let rate = row.median(|run| run.rate);
        let other = rows.iter().find(|r| {
            (r.what, r.clients) == (row.what, row.clients)
                && r.system != row.system
                && row.system == Blixard::NAME
        });
        let ratio = other.map(|other| rate / other.median(|run| run.rate));
        let (low, high) = row.runs.iter().fold((f64::MAX, 0_f64), |(l, h), r| (l.min(r.rate), h.max(r.rate)));
        let (p50, p99) = (row.median(|run| run.p50_ms), row.median(|run| run.p99_ms));
        let shown = ratio.map(|r| format!("{r:.2}")).unwrap_or_default();
        say(&format!(
            "{:6} {:7}  {:8} {rate:9.0} {low:8.0} {high:8.0} {p50:8.2} {p99:8.2} {shown:>7}",
            row.what, row.clients, row.system
        ));
        json_rows.push(json!({
            "what": row.what, "clients": row.clients, "system": row.system, "per_second": rate, "p50_ms": p50,
            "p99_ms": p99, "ratio": ratio, "runs": row.runs,
        }));
    }
    let mut failover = failover::kills::<Blixard>(options, &programs)?;
    failover.show(Blixard::NAME);
    let mut peers = Vec::new();
    if options.peer == Some(Peer::Etcd) {
        let mut other = failover::kills::<Etcd>(options, &programs)?;
        other.show(Etcd::NAME);
        peers.push(json!({"system": Etcd::NAME, "failover": other}));
    }
    let record = json!({
        "title": "raft: three voters on one machine",
        "machine": machine(),
        "load_average_before": load_before,
        "load_average_after": load_average(),
        "seconds": options.seconds,
        "rows": json_rows,
        "failover": failover,
        "peers": peers,
    });
    std::fs::remove_dir_all(&options.work).ok();
    Ok(write_json(out, "raft", &record)?)
}

/// How busy the machine is besides: the average of the last minute.
fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}
