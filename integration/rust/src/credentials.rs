//! Credentials in hex, and a retriever whose credential can be replaced while channels are up.

use ockam::identity::models::{CredentialAndPurposeKey, CredentialSchemaIdentifier};
use ockam::identity::utils::AttributesBuilder;
use ockam::identity::{Attributes, CredentialRetriever, CredentialRetrieverCreator, Identifier};
use ockam::{Address, Error, Result};
use ockam_core::async_trait;
use ockam_core::errcode::{Kind, Origin};
use serde_json::{Map, Value};
use std::sync::{Arc, Mutex};

/// Reads a credential with its purpose key attestation, CBOR in hex.
pub fn from_hex(text: &str) -> std::result::Result<CredentialAndPurposeKey, String> {
    let bytes = hex::decode(text).map_err(|e| format!("credential is not hex: {e}"))?;
    minicbor::decode(&bytes).map_err(|e| format!("not a credential: {e}"))
}

/// Writes one the same way.
pub fn to_hex(credential: &CredentialAndPurposeKey) -> std::result::Result<String, String> {
    ockam_core::cbor_encode_preallocate(credential)
        .map(hex::encode)
        .map_err(|e| e.to_string())
}

/// The attributes of a JSON object of strings.
pub fn attributes(schema: u64, pairs: &Map<String, Value>) -> Attributes {
    let mut builder = AttributesBuilder::with_schema(CredentialSchemaIdentifier(schema));
    for (key, value) in pairs {
        builder = builder.with_attribute(key.as_str(), value.as_str().unwrap_or_default());
    }
    builder.build()
}

/// A named place for the credential that channels present. What the crate's remote retriever does with an
/// authority over the network, a slot does with a command: a new credential tells the channels to send it.
#[derive(Default)]
pub struct Slot {
    credential: Mutex<Option<CredentialAndPurposeKey>>,
    subscribers: Mutex<Vec<Address>>,
}

impl Slot {
    /// Stores the credential and returns the channels that have to be told.
    pub fn replace(&self, credential: CredentialAndPurposeKey) -> Vec<Address> {
        *self.credential.lock().unwrap() = Some(credential);
        self.subscribers.lock().unwrap().clone()
    }
}

#[async_trait]
impl CredentialRetriever for Slot {
    async fn initialize(&self) -> Result<()> {
        Ok(())
    }

    async fn retrieve(&self) -> Result<CredentialAndPurposeKey> {
        self.credential
            .lock()
            .unwrap()
            .clone()
            .ok_or_else(|| Error::new(Origin::Application, Kind::NotFound, "the slot is empty"))
    }

    fn subscribe(&self, address: &Address) -> Result<()> {
        self.subscribers.lock().unwrap().push(address.clone());
        Ok(())
    }

    fn unsubscribe(&self, address: &Address) -> Result<()> {
        self.subscribers.lock().unwrap().retain(|a| a != address);
        Ok(())
    }
}

/// Gives every channel the same slot.
pub struct SlotCreator(pub Arc<Slot>);

#[async_trait]
impl CredentialRetrieverCreator for SlotCreator {
    async fn create(&self, _subject: &Identifier) -> Result<Arc<dyn CredentialRetriever>> {
        Ok(self.0.clone())
    }
}
