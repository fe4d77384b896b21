//! Two programs side by side: medians, their ratio, and what the ratio shall reach.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use crate::table::{TableError, machine, say, write_json};

/// Why results cannot be stored.
pub type CompareError = TableError;

/// In which direction a row is better, and the ratio to the peer that it shall reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Better {
    /// Less is better: at most this ratio.
    Less(f64),
    /// More is better: at least this ratio.
    More(f64),
    /// Less is better: at most this value, without a peer.
    AtMost(f64),
}

struct Row {
    name: String,
    unit: &'static str,
    better: Better,
    columns: [Vec<f64>; 2],
}

/// Samples of rows, ours in column 0 and the peer's in column 1.
pub struct Comparison {
    title: String,
    peer: bool,
    rows: Vec<Row>,
}

#[derive(Serialize)]
struct Record<'a> {
    row: &'a str,
    unit: &'a str,
    ours: Option<f64>,
    peer: Option<f64>,
    ratio: Option<f64>,
    reach: f64,
    reached: Option<bool>,
    samples_ours: &'a [f64],
    samples_peer: &'a [f64],
}

/// The middle of the samples, the mean of two when their number is even.
fn median(samples: &[f64]) -> Option<f64> {
    let middle = samples.len() / 2;
    let upper = samples.get(middle).copied()?;
    if samples.len() % 2 == 1 {
        return Some(upper);
    }
    samples.get(middle.checked_sub(1)?).map(|lower| f64::midpoint(*lower, upper))
}

impl Row {
    fn record(&self) -> Record<'_> {
        let [ours, peer] = &self.columns;
        let ratio = median(ours).zip(median(peer)).map(|(a, b)| if a == b { 1.0 } else { a / b });
        let (reach, reached) = match self.better {
            Better::Less(reach) => (reach, ratio.map(|r| r <= reach)),
            Better::More(reach) => (reach, ratio.map(|r| r >= reach)),
            Better::AtMost(reach) => (reach, median(ours).map(|value| value <= reach)),
        };
        let (row, unit) = (self.name.as_str(), self.unit);
        let (samples_ours, samples_peer) = (ours.as_slice(), peer.as_slice());
        Record {
            row,
            unit,
            ours: median(ours),
            peer: median(peer),
            ratio,
            reach,
            reached,
            samples_ours,
            samples_peer,
        }
    }

    fn line(&self, width: usize) -> String {
        let number = |value: Option<f64>| value.map_or_else(|| "-".into(), |v| format!("{v:.2}"));
        let record = self.record();
        let [ours, peer] = &self.columns;
        let least = |samples: &[f64]| number(samples.first().copied());
        let reach = match self.better {
            Better::Less(reach) => format!("≤ {reach}"),
            Better::More(reach) => format!("≥ {reach}"),
            Better::AtMost(reach) => format!("≤ {reach}{}", self.unit),
        };
        let verdict = match record.reached {
            Some(true) => "yes",
            Some(false) => "NO",
            None => "",
        };
        let name =
            if self.unit.is_empty() { self.name.clone() } else { format!("{}, {}", self.name, self.unit) };
        format!(
            "{name:width$}  {:>4}  {:>10}  {:>10}  {:>10}  {:>10}  {:>7}  {reach:>6}  {verdict}",
            ours.len(),
            number(record.ours),
            least(ours),
            number(record.peer),
            least(peer),
            number(record.ratio),
        )
    }
}

impl Comparison {
    /// An empty table.
    pub fn new(title: &str, peer: bool) -> Self {
        Self { title: title.into(), peer, rows: vec![] }
    }

    /// Adds a sample.
    pub fn add(&mut self, name: &str, unit: &'static str, better: Better, column: usize, value: f64) {
        let at = self.rows.iter().position(|row| row.name == name).unwrap_or_else(|| {
            self.rows.push(Row { name: name.into(), unit, better, columns: [vec![], vec![]] });
            self.rows.len().saturating_sub(1)
        });
        if let Some(samples) = self.rows.get_mut(at).and_then(|row| row.columns.get_mut(column)) {
            samples.push(value);
        }
    }

    /// Prints the table and writes `NAME.json` in `folder`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn show_and_write(mut self, folder: &Path, name: &str) -> Result<(), TableError> {
        for row in &mut self.rows {
            row.columns.iter_mut().for_each(|samples| samples.sort_by(f64::total_cmp));
        }
        let width = self.rows.iter().map(|r| r.name.chars().count() + r.unit.len() + 2).max().unwrap_or(0);
        let peer = if self.peer { "peer" } else { "no peer" };
        say(&format!(
            "{}\n{:width$}  {:>4}  {:>10}  {:>10}  {:>10}  {:>10}  {:>7}  {:>6}",
            self.title, "median", "n", "ours", "min", peer, "min", "ratio", "reach"
        ));
        self.rows.iter().for_each(|row| say(&row.line(width)));
        let records: Vec<_> = self.rows.iter().map(Row::record).collect();
        let mut all: BTreeMap<&str, serde_json::Value> = BTreeMap::new();
        all.insert("title", self.title.as_str().into());
        all.insert("machine", machine().into());
        all.insert("rows", serde_json::to_value(&records).map_err(TableError::Encode)?);
        write_json(folder, name, &all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_of_samples_is_the_mean_of_the_middle_two() {
        assert_eq!(median(&[1.0, 2.0, 4.0, 9.0]), Some(3.0));
        assert_eq!(median(&[1.0, 2.0, 9.0]), Some(2.0));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn a_row_is_reached_by_the_direction_in_which_it_is_better() {
        let mut table = Comparison::new("", true);
        for (column, value) in [(0, 2.0), (1, 8.0)] {
            table.add("time", "ms", Better::Less(0.3), column, value);
            table.add("rate", "/s", Better::More(3.0), column, value);
        }
        let reached: Vec<_> = table.rows.iter().map(|row| row.record().reached).collect();
        assert_eq!(reached, [Some(true), Some(false)]);
    }
}
