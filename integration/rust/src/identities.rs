//! Commands about identities and credentials.

use crate::args::{Answer, Args};
use crate::credentials;
use crate::peer::{line, Peer};
use ockam::identity::Identifier;
use ockam::vault::SigningKeyType;
use ockam::Route;
use serde_json::{json, Map, Value};
use std::time::Duration;

impl Peer {
    async fn identity_facts(&self, id: &Identifier) -> Answer {
        let history = self
            .node
            .identities()
            .export_identity(id)
            .await
            .map_err(line)?;
        Ok(json!({"identifier": id.to_string(), "history": hex::encode(history)}))
    }

    pub async fn create_identity(&self, args: &Args) -> Answer {
        let name = args.text("name")?;
        let id = self
            .node
            .identities_creation()
            .identity_builder()
            .with_random_key(key_type(args)?)
            .build()
            .await
            .map_err(line)?;
        self.names
            .lock()
            .unwrap()
            .identities
            .insert(name.to_string(), id.clone());
        self.identity_facts(&id).await
    }

    pub async fn rotate(&self, args: &Args) -> Answer {
        let id = self.identity(args.text("name")?)?;
        let creation = self.node.identities_creation();
        let mut builder = creation.identity_builder().with_random_key(key_type(args)?);
        if args.flag("revoke") {
            builder = builder.with_purpose_keys_revocation();
        }
        let options = builder.build_options().await.map_err(line)?;
        creation
            .rotate_identity_with_options(&id, options)
            .await
            .map_err(line)?;
        self.identity_facts(&id).await
    }

    pub async fn import_identity(&self, args: &Args) -> Answer {
        let id = self.import(args.text("history")?).await?;
        Ok(json!({"identifier": id.to_string()}))
    }

    pub async fn issue(&self, args: &Args) -> Answer {
        let issuer = self.identity(args.text("issuer")?)?;
        let subject = self.import(args.text("history")?).await?;
        let none = Map::new();
        let pairs = args.0["attributes"].as_object().unwrap_or(&none);
        let credential = self
            .node
            .credentials()
            .credentials_creation()
            .issue_credential(
                &issuer,
                &subject,
                credentials::attributes(args.number("schema", 1), pairs),
                Duration::from_secs(args.number("ttl_s", 3600)),
            )
            .await
            .map_err(line)?;
        Ok(json!({"credential": credentials::to_hex(&credential)?}))
    }

    pub async fn fill_slot(&self, args: &Args) -> Answer {
        let credential = credentials::from_hex(args.text("credential")?)?;
        let told = self.slot(args.text("slot")?).replace(credential);
        let context = self.sender()?;
        for channel in &told {
            let route = Route::create(vec![channel.clone()]);
            context.send(route, ()).await.map_err(line)?;
        }
        Ok(json!({"channels": told.len()}))
    }

    pub async fn verify(&self, args: &Args) -> Answer {
        let credential = credentials::from_hex(args.text("credential")?)?;
        let authority = self.import(args.text("authority")?).await?;
        let subject = match args.maybe_text("subject") {
            Some(text) => Some(Identifier::try_from(text).map_err(line)?),
            None => None,
        };
        let data = self
            .node
            .credentials()
            .credentials_verification()
            .verify_credential(subject.as_ref(), &[authority], &credential)
            .await
            .map_err(line)?
            .credential_data;
        let attributes: Map<String, Value> = data
            .subject_attributes
            .map
            .iter()
            .map(|(k, v)| {
                (
                    String::from_utf8_lossy(k).into_owned(),
                    json!(String::from_utf8_lossy(v)),
                )
            })
            .collect();
        Ok(json!({
            "subject": data.subject.map(|s| s.to_string()),
            "schema": data.subject_attributes.schema.0,
            "attributes": attributes,
            "created_at": data.created_at.0,
            "expires_at": data.expires_at.0,
        }))
    }

    pub async fn attributes(&self, args: &Args) -> Answer {
        let subject = Identifier::try_from(args.text("subject")?).map_err(line)?;
        let authority = Identifier::try_from(args.text("authority")?).map_err(line)?;
        let entry = self
            .node
            .identities_attributes()
            .get_attributes(&subject, &authority)
            .await
            .map_err(line)?;
        Ok(json!({"attributes": entry.map(|entry| entry.string_attributes())}))
    }
}

fn key_type(args: &Args) -> Result<SigningKeyType, String> {
    match args.maybe_text("key").unwrap_or("ed25519") {
        "ed25519" => Ok(SigningKeyType::EdDSACurve25519),
        "p256" => Ok(SigningKeyType::ECDSASHA256CurveP256),
        other => Err(format!("unknown kind of key {other:?}")),
    }
}
