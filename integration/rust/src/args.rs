//! Reading the fields of a command.

use crate::content::content;
use serde_json::Value;
use std::time::Duration;

/// What a command answers: a JSON value, or a message for the script.
pub type Answer = std::result::Result<Value, String>;

/// The fields of one command.
pub struct Args(pub Value);

impl Args {
    pub fn text(&self, key: &str) -> Result<&str, String> {
        self.maybe_text(key)
            .ok_or_else(|| format!("the command needs a string {key:?}"))
    }

    pub fn maybe_text(&self, key: &str) -> Option<&str> {
        self.0[key].as_str()
    }

    pub fn number(&self, key: &str, default: u64) -> u64 {
        self.0[key].as_u64().unwrap_or(default)
    }

    pub fn flag(&self, key: &str) -> bool {
        self.0[key].as_bool().unwrap_or(false)
    }

    /// A list of strings; a missing one is empty.
    pub fn list(&self, key: &str) -> Vec<&str> {
        self.0[key]
            .as_array()
            .map(|items| items.iter().filter_map(Value::as_str).collect())
            .unwrap_or_default()
    }

    pub fn sizes(&self) -> Result<Vec<usize>, String> {
        let sizes: Vec<usize> = self.0["sizes"]
            .as_array()
            .map(|items| {
                items
                    .iter()
                    .filter_map(|v| v.as_u64().map(|n| n as usize))
                    .collect()
            })
            .unwrap_or_default();
        if sizes.is_empty() {
            return Err("the command needs a list of numbers \"sizes\"".into());
        }
        Ok(sizes)
    }

    pub fn timeout(&self) -> Duration {
        Duration::from_millis(self.number("timeout_ms", 10_000))
    }

    /// The payload: `hex`, `text` (sent as a BARE string), or `size` bytes of the run `seed` at `index`.
    pub fn payload(&self) -> Result<Vec<u8>, String> {
        if let Some(text) = self.maybe_text("hex") {
            return hex::decode(text).map_err(|e| format!("payload is not hex: {e}"));
        }
        if let Some(text) = self.maybe_text("text") {
            return ockam::serialize(text.to_string()).map_err(|e| e.to_string());
        }
        if self.0["size"].is_u64() {
            return Ok(content(
                self.number("seed", 0),
                self.number("index", 0),
                self.number("size", 0) as usize,
            ));
        }
        Err("the command needs a payload: \"hex\", \"text\" or \"size\"".into())
    }
}
