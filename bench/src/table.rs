//! Samples, medians, tables, JSON.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// What can go wrong when results are written.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The results cannot be stored.
    #[error("cannot write {path}")]
    Write {
        /// Which file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The results cannot be put as JSON.
    #[error("cannot encode the results")]
    Encode(#[source] serde_json::Error),
}

/// Samples of several rows in milliseconds, in order of first appearance.
#[derive(Debug, Default)]
pub struct Table {
    title: String,
    rows: Vec<(String, Vec<f64>)>,
}

#[derive(Serialize)]
struct Row<'a> {
    row: &'a str,
    n: usize,
    median_ms: f64,
    min_ms: f64,
    max_ms: f64,
    samples_ms: &'a [f64],
}

impl Table {
    /// An empty table.
    pub fn new(title: &str) -> Self {
        Self { title: title.into(), rows: Vec::new() }
    }

    /// Adds a sample in milliseconds.
    pub fn add(&mut self, row: &str, ms: f64) {
        match self.rows.iter_mut().find(|(name, _)| name == row) {
            Some((_, samples)) => samples.push(ms),
            None => self.rows.push((row.into(), vec![ms])),
        }
    }

    /// Prints the table and writes `NAME.json` in `folder`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn show_and_write(mut self, folder: &Path, name: &str) -> Result<(), TableError> {
        for (_, samples) in &mut self.rows {
            samples.sort_by(f64::total_cmp);
        }
        let rows: Vec<Row> = self
            .rows
            .iter()
            .map(|(row, samples)| Row {
                row,
                n: samples.len(),
                median_ms: samples.get(samples.len() / 2).copied().unwrap_or(f64::NAN),
                min_ms: samples.first().copied().unwrap_or(f64::NAN),
                max_ms: samples.last().copied().unwrap_or(f64::NAN),
                samples_ms: samples,
            })
            .collect();
        let width = rows.iter().map(|r| r.row.len()).max().unwrap_or(0).max(4);
        say(&format!(
            "{}\n{:width$}  {:>4}  {:>10}  {:>10}  {:>10}",
            self.title, "step", "n", "median ms", "min", "max"
        ));
        for r in &rows {
            say(&format!(
                "{:width$}  {:>4}  {:>10.2}  {:>10.2}  {:>10.2}",
                r.row, r.n, r.median_ms, r.min_ms, r.max_ms
            ));
        }
        let mut record: BTreeMap<&str, serde_json::Value> = BTreeMap::new();
        record.insert("title", self.title.as_str().into());
        record.insert("machine", machine().into());
        record.insert("rows", serde_json::to_value(&rows).map_err(TableError::Encode)?);
        write_json(folder, name, &record)
    }
}

/// Writes `NAME.json` in `folder`.
///
/// # Errors
/// The file cannot be written.
pub fn write_json(folder: &Path, name: &str, record: &impl Serialize) -> Result<(), TableError> {
    let text = serde_json::to_string_pretty(record).map_err(TableError::Encode)?;
    let path = folder.join(format!("{name}.json"));
    let failed = |source| TableError::Write { path: path.clone(), source };
    std::fs::create_dir_all(folder).map_err(failed)?;
    std::fs::write(&path, text).map_err(failed)
}

/// Processor and kernel of this machine, for the record.
pub fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or_default();
    let cpus = cpuinfo.lines().filter(|l| l.starts_with("processor")).count();
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{cpus} x {}, Linux {}", model.trim_start_matches([' ', '\t', ':']), kernel.trim())
}

/// Prints a line.
#[expect(clippy::print_stdout, reason = "the table is what a benchmark is run for")]
pub fn say(line: &str) {
    println!("{line}");
}

/// Prints an error with its causes.
#[expect(clippy::print_stderr, reason = "the last word of a program that failed")]
pub fn complain(error: &dyn Error) {
    eprintln!("error: {error}");
    let mut cause = error.source();
    while let Some(next) = cause {
        eprintln!("  because {next}");
        cause = next.source();
    }
}
