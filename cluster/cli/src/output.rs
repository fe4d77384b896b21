//! Standard output and standard error: tables, JSON, YAML, names; nothing that a stranger wrote can move the cursor.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;
use serde_json::Value;

use crate::args::Format;
use crate::error::CliError;

/// Where a command writes to, and in which form.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    pub format: Format,
    pub quiet: bool,
}

/// Rows below a head; cells are shown as wide as the widest of their column.
pub struct Table {
    head: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(head: &[&'static str]) -> Self {
        Self { head: head.to_vec(), rows: vec![] }
    }

    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells.into_iter().map(|c| printable(&c)).collect());
    }

    /// The table as text, each line ended.
    pub fn render(&self) -> String {
        let mut widths: Vec<usize> = self.head.iter().map(|h| h.len()).collect();
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut text = String::new();
        let head: Vec<String> = self.head.iter().map(|h| (*h).to_owned()).collect();
        for row in std::iter::once(&head).chain(&self.rows) {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                let cell = if cell.is_empty() { "-" } else { cell };
                line.push_str(&format!("{cell:<width$}   "));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// The text without characters that control a terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

impl Output {
    /// JSON or YAML is wanted.
    pub fn structured(self) -> bool {
        matches!(self.format, Format::Json | Format::Yaml)
    }

    /// Progress may be shown: a person looks, and did not ask for quiet.
    pub fn progress(self) -> bool {
        !self.quiet && !self.structured() && io::stderr().is_terminal()
    }

    /// Prints text as it is.
    pub fn text(self, text: &str) -> Result<(), CliError> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(CliError::Output)
    }

    /// Prints a line.
    pub fn line(self, text: &str) -> Result<(), CliError> {
        self.text(&format!("{}\n", printable(text)))
    }

    /// Prints a value as YAML when that is wanted, otherwise as JSON.
    pub fn value(self, value: &impl Serialize) -> Result<(), CliError> {
        let value = serde_json::to_value(value).map_err(|e| CliError::Output(e.into()))?;
        if self.format == Format::Yaml {
            return self.text(&yaml(&value));
        }
        let text = serde_json::to_string_pretty(&value).map_err(|e| CliError::Output(e.into()))?;
        self.text(&format!("{text}\n"))
    }

    /// Prints a value on one line (YAML: as one document).
    pub fn event(self, value: &impl Serialize) -> Result<(), CliError> {
        let value = serde_json::to_value(value).map_err(|e| CliError::Output(e.into()))?;
        match self.format {
            Format::Yaml => self.text(&format!("---\n{}", yaml(&value))),
            _ => self.text(&format!("{value}\n")),
        }
    }

    /// Prints to standard error; nobody can be told when that fails.
    pub fn note(self, text: &str) {
        let _ = writeln!(io::stderr().lock(), "{text}");
    }

    /// Prints an error.
    pub fn error(self, error: &CliError) {
        if error.is_closed_output() {
            return;
        }
        match self.format {
            Format::Json => self.note(&error.to_json()),
            _ => self.note(&error.to_text().lines().map(printable).collect::<Vec<_>>().join("\n")),
        }
    }
}

/// The value in YAML 1.2 block style. Every text that is not plainly a word is quoted as JSON, which is YAML too.
pub fn yaml(value: &Value) -> String {
    let mut text = String::new();
    yaml_block(value, 0, &mut text);
    text
}

fn yaml_block(value: &Value, depth: usize, text: &mut String) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(map) if !map.is_empty() => {
            for (key, inner) in map {
                text.push_str(&format!("{indent}{}:", yaml_scalar(&Value::String(key.clone()))));
                yaml_inner(inner, depth + 1, text);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for inner in items {
                let mut block = String::new();
                yaml_block(inner, depth + 1, &mut block);
                let nested = "  ".repeat(depth + 1);
                text.push_str(&format!("{indent}- {}", block.strip_prefix(&nested).unwrap_or(&block)));
            }
        }
        scalar => text.push_str(&format!("{indent}{}\n", yaml_scalar(scalar))),
    }
}

fn yaml_inner(value: &Value, depth: usize, text: &mut String) {
    let nested = match value {
        Value::Object(map) => !map.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => false,
    };
    if nested {
        text.push('\n');
        yaml_block(value, depth, text);
    } else {
        text.push_str(&format!(" {}\n", yaml_scalar(value)));
    }
}

fn yaml_scalar(value: &Value) -> String {
    let Value::String(word) = value else { return value.to_string() };
    let plain = word.bytes().next().is_some_and(|b| b.is_ascii_alphabetic())
        && word.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b))
        && !["null", "true", "false", "yes", "no", "on", "off", "y", "n"]
            .contains(&word.to_ascii_lowercase().as_str());
    if plain { word.clone() } else { value.to_string() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_an_empty_cell_is_a_dash() {
        let mut table = Table::new(&["NAME", "ID"]);
        table.row(vec!["a-long-name".into(), "1".into()]);
        table.row(vec!["b".into(), String::new()]);
        assert_eq!(table.render(), "NAME          ID\na-long-name   1\nb             -\n");
    }

    #[test]
    fn escape_sequences_of_strangers_do_not_reach_the_terminal() {
        let mut table = Table::new(&["REASON"]);
        table.row(vec!["\u{1b}[2Jgone\nnext".into()]);
        assert_eq!(table.render(), "REASON\n\u{fffd}[2Jgone\u{fffd}next\n");
    }

    #[test]
    fn yaml_nests_by_indentation_and_quotes_what_is_no_plain_word() {
        let value = json!([{
            "name": "web", "id": "01ARZ3", "empty": {}, "none": null, "on": true, "list": ["a b", 1, []],
            "spec": { "env": { "A": "no", "B": "x: y" } }
        }]);
        assert_eq!(
            yaml(&value),
            "- empty: {}\n  id: \"01ARZ3\"\n  list:\n    - \"a b\"\n    - 1\n    - []\n  name: web\n  none: null\n  \
             \"on\": true\n  spec:\n    env:\n      A: \"no\"\n      B: \"x: y\"\n"
        );
    }
}
