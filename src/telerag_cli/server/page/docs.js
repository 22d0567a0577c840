// The API's description, drawn by Swagger UI from the package.

import { apiKey } from "./api.js";

const place = document.getElementById("api");

function say(words) {
  const line = document.createElement("p");
  line.textContent = words;
  place.replaceChildren(line);
}

function withKey(request) {
  if (apiKey() && new URL(request.url, document.baseURI).origin === location.origin) {
    request.headers.authorization ??= `Bearer ${apiKey()}`;
  }
  return request;
}

async function show() {
  const response = await fetch(new URL("openapi.json", document.baseURI), {
    headers: apiKey() ? { authorization: `Bearer ${apiKey()}` } : {},
  });
  if (response.status === 401) say("This server asks for a key. Give it on the page with the questions, in this tab, and come back.");
  else if (!response.ok) say(`The server answered ${response.status} instead of the description of its API.`);
  else {
    place.replaceChildren();
    // Without a validator: it is another site's.
    window.SwaggerUIBundle({
      domNode: place, spec: await response.json(), deepLinking: true, layout: "BaseLayout", requestInterceptor: withKey, validatorUrl: null,
    });
  }
}

show().catch(() => say("The server cannot be reached."));
