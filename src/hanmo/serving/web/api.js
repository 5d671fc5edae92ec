// Talking to the server: the model's description, and answers as a stream of events.

export class ApiError extends Error {
  constructor(code, message = "") {
    super(message);
    this.code = code;
  }
}

/** The first model of the server: {id, context_length, writes, chat, tasks}. */
export async function fetchModel() {
  const response = await request("/v1/models", {});
  return (await response.json()).data[0];
}

/** The tasks that the model can do: {id, description, description_zh, input, asked, needs_labels, labels}. */
export async function fetchTasks() {
  const response = await request("/v1/tasks", {});
  return (await response.json()).data;
}

/** The answer to one text; aborting the signal ends the work on the server too. */
export async function runTask(task, body, signal) {
  const response = await request(`/v1/tasks/${task}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  return (await response.json()).data[0];
}

/**
 * Send a request and yield {text, usage, finishReason} for each chunk of the answer.
 * Aborting the signal ends the generation on the server too, because the connection closes.
 */
export async function* streamAnswer(path, body, signal) {
  const response = await request(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { continuous_usage_stats: true } }),
    signal,
  });
  for await (const data of serverEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.code, chunk.error.message);
    const choice = chunk.choices[0] ?? {};
    yield {
      text: choice.delta?.content ?? choice.text ?? "",
      usage: chunk.usage,
      finishReason: choice.finish_reason ?? null,
    };
  }
  throw new ApiError("broken");
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("offline");
  }
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  throw new ApiError(problem.error?.code ?? null, problem.error?.message ?? `HTTP ${response.status}`);
}

/** The data of each server-sent event; a character or a line may be split over several reads. */
async function* serverEvents(stream) {
  const decoder = new TextDecoder();
  const reader = stream.getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      buffer += decoder.decode(value, { stream: true });
      let end;
      while ((end = buffer.indexOf("\n\n")) >= 0) {
        const event = buffer.slice(0, end);
        buffer = buffer.slice(end + 2);
        if (event.startsWith("data: ")) yield event.slice(6);
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("broken");
  } finally {
    reader.cancel().catch(() => {});
  }
}
